#!/usr/bin/env bash
# Prints the settings of a site, one NAME=value a line: profile.sh SITE [PLACE NAME VALUE]…. It alone reads slurm/*.env and .env.local,
# for the scripts here and for `nanochat cluster submit`: NAME=value, in quotation marks if the value has blanks, with variables as
# $NAME, and # before comments. Nothing is executed: what a shell would do more with, and values that do not fit, are errors.
set -Eeuo pipefail
shopt -s nocasematch # names may be in small letters
names=(MODULES PARTITION CPU_PARTITION GRES GPUS CPUS MEMORY TIME SCRATCH ACCOUNT MAIL_USER BASE_DIR VENV TIMEOUT)
variable='\$([a-z_][a-z0-9_]*|[{][a-z_][a-z0-9_]*[}])'
plain="([^[:blank:]\"'\\;&|<>()\`~#\$]|$variable)*" quoted="\"([^\"\\\`\$]|$variable)*\"" literal="'[^'\$]*'"

fail() { echo "$*" >&2 && exit 1; }

set_value() { # PLACE NAME VALUE: sets NANOCHAT_NAME
    case "$2" in
        GPUS | CPUS | TIMEOUT) wanted="a whole number" pattern='[0-9]+' ;;
        MEMORY) wanted="a number of megabytes, or one with K, M, G or T" pattern='[0-9]+[KMGT]?' ;;
        TIME) wanted="a time limit such as 12:00:00" pattern='([0-9]+-)?[0-9]+(:[0-9]+)?(:[0-9]+)?' ;;
        SCRATCH | BASE_DIR | VENV) wanted="a path that begins with /" pattern='/[^[:cntrl:]]*' ;;
        MAIL_USER) wanted="an address, name@host" pattern='[^[:space:]@,]+@[^[:space:]@,]+' ;;
        MODULES) wanted="names with blanks between them" pattern='[[:alnum:]_./:,+@=% -]+' ;;
        *) wanted="one word" pattern='[[:alnum:]_./:,+@=%-]+' ;;
    esac
    [[ -z "$3" || "$3" =~ ^($pattern)$ ]] || fail "$1: NANOCHAT_$2 must be $wanted, got '$3'"
    printf -v "NANOCHAT_$2" %s "$3"
}

find_name() { # KEY NAME…: sets `name` to the one that KEY stands for; before MAIL_USER it may lack NANOCHAT_
    for name in "${@:2}"; do [[ "$1" == "NANOCHAT_$name" || "$1" == MAIL_USER && "$name" == MAIL_USER ]] && return; done
    return 1
}

read_file() { # FILE NAME…: sets these names; other lines are errors, but not in .env.local
    local number=0 line place given own=(own number line place given name value key profile chosen names variable plain quoted literal wanted pattern) # not to be seen
    while IFS= read -r line || [[ -n "$line" ]]; do
        number=$((number + 1)) place="$1:$number" line="${line%$'\r'}" given="${line#*=}"
        if [[ ! "$line" =~ ^[[:blank:]]*(export[[:blank:]]+)?([a-z0-9_]+)= ]] || ! find_name "${BASH_REMATCH[2]}" "${@:2}"; then
            [[ "$1" == .env.local || "$line" =~ ^[[:blank:]]*(#.*)?$ ]] && continue
            fail "$place: expected NAME=value with one of ${names[*]/#/NANOCHAT_}, got '$line'"
        fi
        [[ "$given" =~ ^($plain|$quoted|$literal)([[:blank:]]+#.*|[[:blank:]]*)$ ]] ||
            fail "$place: cannot read $given; wanted a value, in quotation marks if it has blanks; commands are not run"
        value="$(exec 2> /dev/null; set -- "${BASH_REMATCH[1]}"; unset "${own[@]}"; eval "value=$1"; printf %s "$value")" || fail "$place: $given refers to a variable that is not set"
        set_value "$place" "$name" "$value"
    done < "$1"
}

profile="$1" chosen=()
[[ "$profile" == *.env ]] || profile="slurm/$profile.env"
[[ -f "$profile" ]] || fail "site $1: $profile does not exist; existing profiles: $(echo slurm/*.env); copy slurm/generic.env for a new one"
for key in $(compgen -e); do # what the environment sets comes before the profile, and is read before the profile changes it
    if [[ -n "${!key}" ]] && find_name "$key" ACCOUNT MAIL_USER BASE_DIR VENV TIMEOUT; then chosen+=("$key" "$name" "${!key}"); fi
done
chosen+=("${@:2}") USER="${USER:-$(id -un)}"
for name in "${names[@]}"; do printf -v "NANOCHAT_$name" %s ""; done
read_file "$profile" "${names[@]}"
[[ ! -f .env.local ]] || read_file .env.local ACCOUNT MAIL_USER
for ((i = 0; i < ${#chosen[@]}; i += 3)); do set_value "${chosen[@]:i:3}"; done
[[ -z "$NANOCHAT_SCRATCH" ]] || : "${NANOCHAT_BASE_DIR:=$NANOCHAT_SCRATCH/nanochat-cache}" "${NANOCHAT_VENV:=$NANOCHAT_SCRATCH/nanochat-venv}"
for name in "${names[@]/#/NANOCHAT_}"; do echo "$name=${!name}"; done

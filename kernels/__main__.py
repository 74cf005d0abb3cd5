"""python -m nanochat_kernels: compile the kernels ahead of time for CMakeLists.txt, check what was made, or write them for a hub.

python -m nanochat_kernels export --archs 80 90 --out build/code
python -m nanochat_kernels check build/code
python -m nanochat_kernels hub --out build/hub
"""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    from nanochat_kernels import configs, export, hub, inspect

    parser = argparse.ArgumentParser(prog="python -m nanochat_kernels", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export", help="compile every launch of every kernel; no GPU is needed")
    exporting.add_argument("--archs", nargs="+", default=["80", "90"], help="compute capabilities: 80, 90 or both")
    exporting.add_argument("--out", type=Path, required=True, help="folder that is written")
    exporting.add_argument("--kernels", nargs="*", default=[], help="only these kernels of the launch tables")
    exporting.add_argument(
        "--training-only", action="store_true", help="only the dtypes of training and the engine, mostly bfloat16"
    )
    checking = commands.add_parser("check", help="check exported code: spills, shared memory, instructions, files")
    checking.add_argument("folder", type=Path)
    hub_command = commands.add_parser("hub", help="write the package in the layout of Hugging Face's kernels hub")
    hub_command.add_argument("--out", type=Path, required=True, help="folder of the repository")
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            print(export.check(options.folder))
        elif options.command == "hub":
            hub.write_hub(options.out)
        else:
            export.export_all(options.archs, options.out, tuple(options.kernels), options.training_only)
    except (export.CannotExport, inspect.CannotRun, configs.LaunchTableError, OSError) as error:
        sys.exit(f"nanochat_kernels: error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])

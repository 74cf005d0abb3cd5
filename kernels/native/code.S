/* Embeds NK_CODE_FILE, the code of all kernels, as nk_code. */
    .section .rodata
    .globl nk_code
    .hidden nk_code
    .balign 64
nk_code:
    .incbin NK_CODE_FILE
    .section .note.GNU-stack, "", @progbits

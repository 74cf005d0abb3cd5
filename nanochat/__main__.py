"""`python -m nanochat`, so that `torchrun --nproc_per_node=N -m nanochat …` works."""

from nanochat.cli import main

if __name__ == "__main__":
    main()

"""Slurm: site profiles, the sbatch call of a job, the launch of processes inside a job, and the state of a run."""

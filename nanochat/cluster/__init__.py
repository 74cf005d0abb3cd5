"""Slurm: site profiles, the sbatch call of a job, how processes start inside one, and the state of a run."""

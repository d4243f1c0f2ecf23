"""Jobs of SLURM: scripts for sbatch, and what happens to a job that ends."""

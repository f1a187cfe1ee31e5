"""What is about SLURM alone: its queue, the driver's lock, jobs a dead driver left, and the driver as a job."""

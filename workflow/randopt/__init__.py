"""RandOpt on HPC: gradient-free post-training by scored Gaussian perturbations and majority vote."""

__version__ = "0.1.0"

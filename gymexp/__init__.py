"""gymexp: RL post-training experiments in NeMo Gym environments, from one command."""

__version__ = "0.1.0"

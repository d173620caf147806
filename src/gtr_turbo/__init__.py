"""GTR-Turbo: train vision-language agents, guided by the merge of their own checkpoints.

Importing the package imports no torch; `import gtr_turbo.envs` registers the environments.
"""

__version__ = "0.1.0"

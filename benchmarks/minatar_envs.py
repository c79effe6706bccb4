"""MinAtar's environments for gymnasium: with this folder on PYTHONPATH, an --env-id is
minatar_envs:MinAtar/Breakout-v1 (pip install minatar==1.0.15, which is GPL)."""

from minatar.gym import register_envs

register_envs()

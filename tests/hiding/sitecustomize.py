"""The packages that HIDDEN names are not found, as if they were not installed.

PYTHONPATH=tests/hiding HIDDEN="torch accelerate" python train.py
"""

import importlib.machinery
import os

hidden = os.environ["HIDDEN"].split()
find = importlib.machinery.PathFinder.find_spec


def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else find(name, path, target)


importlib.machinery.PathFinder.find_spec = staticmethod(find_others)

"""Draw the README's picture of the schedules.

python results/make.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from recipes import RECIPES
from report import save_schedules

if __name__ == "__main__":
    cifar10 = {name: recipe for name, recipe in RECIPES.items() if recipe.data == "cifar10"}
    save_schedules(cifar10, Path(__file__).with_name("schedules.png"))

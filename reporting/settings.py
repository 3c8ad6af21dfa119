"""What a run was trained with, in words: its recipe, and the settings in which it differs from that."""

from dataclasses import replace

from recipes import ANCESTOR, RECIPES, OneCycle, Recipe

# `fast` as it was before it had any of today's tricks. No option sets a schedule, so that it tells the two apart.
FIRST_FAST = replace(ANCESTOR, lr=0.8, schedule=OneCycle(pct_start=0.2), label_smoothing=0.1)


def changes(result: dict, recipe: Recipe) -> dict:
    """The settings, data and width aside, in which a run differs from `recipe`; `result` is its `result.json`."""
    names = [name for name in vars(recipe) if name not in ("data", "width")]
    had = {name: result.get(name, getattr(ANCESTOR, name)) for name in names}  # newer settings are off in the ancestor
    return {name: value for name, value in had.items() if str(value) != str(getattr(recipe, name))}


def how(result: dict) -> str:
    """The recipe's name, and the settings in which the run differs from the recipe as it is today.

    Those of a recipe that is no more are the settings in which it differs from the ancestor.
    """
    name = result["recipe"]
    recipe = RECIPES.get(name, ANCESTOR)
    if name == "fast" and result["schedule"] == str(FIRST_FAST.schedule):
        name, recipe = "first fast", FIRST_FAST
    differ = changes(result, replace(recipe, epochs=result["epochs"]))
    words = [name, f"{result['epochs']} epochs", *(f"{key.replace('_', ' ')} {value}" for key, value in differ.items())]
    if result.get("processes", 1) > 1:
        words.append(f"{result['processes']} processes")
    return ", ".join(words + [f"{result['norm']} norm"] * (result["norm"] != "batch"))

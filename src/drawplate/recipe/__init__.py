"""What a user wants of a run: the vocabulary (sections.py), how it is read (reading.py), and where things are kept.

It is imported from this package; which of its files holds a name is nobody's concern.
"""

from drawplate.recipe.places import cache_folder, expand
from drawplate.recipe.reading import known_keys, load_recipe
from drawplate.recipe.sections import (
    FOUR_BITS,
    USUAL_RANK,
    Auto,
    DataSection,
    EvaluationSection,
    LoraSection,
    MemorySection,
    ModelSection,
    QuantizationSection,
    Recipe,
    Section,
    TrackingSection,
    TrainSection,
)

__all__ = [
    "FOUR_BITS",
    "USUAL_RANK",
    "Auto",
    "DataSection",
    "EvaluationSection",
    "LoraSection",
    "MemorySection",
    "ModelSection",
    "QuantizationSection",
    "Recipe",
    "Section",
    "TrackingSection",
    "TrainSection",
    "cache_folder",
    "expand",
    "known_keys",
    "load_recipe",
]

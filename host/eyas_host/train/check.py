"""Checks that both networks can be built and run, before hours of training."""

from __future__ import annotations

import torch

from eyas_host.models.factory import PixelClassifier, build_student, build_teacher
from eyas_host.models.weights import WeightsFit, fit_to_images
from eyas_host.recipe import Recipe
from eyas_host.support.errors import RecipeError
from eyas_host.train.feature_distillation import check_feature_layers


def check_networks(recipe: Recipe, classes: int) -> list[WeightsFit]:
    """Build and run teacher and student; returns how well the weights of each suit the images, the teacher's first.

    Raises as `build` does, and `RecipeError` for a network that does not accept this image size and for unknown blocks
    in `[student] feature_layers`.
    """
    image = recipe.image
    teacher, student = build_teacher(recipe.teacher, classes), build_student(recipe.student, classes)
    fits = []
    for (model, origin), name in ((teacher, recipe.teacher.model), (student, recipe.student.model)):
        try_network(model, name, image.size)
        fits.append(fit_to_images(model.backbone, name, origin, image))
    check_feature_layers(recipe.student.feature_layers, teacher[0], student[0], image.size)
    return fits


def try_network(model: PixelClassifier, name: str, size: int) -> None:
    """Predict one image on the processor. Raises `RecipeError` for a network that does not accept this size."""
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise RecipeError(
            f"model {name!r} does not accept [image] size = {size} ({' '.join(str(error).split())[:200]})"
        ) from None

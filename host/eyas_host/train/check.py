"""Checks that both networks can be built and run, before hours of training."""

from __future__ import annotations

import torch

from eyas_host.models.factory import PixelClassifier, build_student, build_teacher
from eyas_host.models.weights import WeightsFit, fit_to_images
from eyas_host.recipe import Recipe
from eyas_host.support.errors import RecipeError
from eyas_host.train.feature_distillation import check_feature_layers
from eyas_host.train.progressive import side_of


def check_networks(recipe: Recipe, classes: int) -> list[WeightsFit]:
    """Build and run teacher and student; returns how well the weights of each suit the images, the teacher's first.

    Raises as `build` does, and `RecipeError` for a network that does not accept this image size, or the smaller one of
    progressive resizing, and for unknown blocks in `[student] feature_layers`.
    """
    image = recipe.image
    teacher, student = build_teacher(recipe.teacher, classes), build_student(recipe.student, classes)
    fits = []
    for (model, origin), section, settings in (
        (teacher, "teacher", recipe.teacher),
        (student, "student", recipe.student),
    ):
        try_network(model, settings.model, image.size)
        side = side_of(0, settings.progressive, settings.epochs, image.size)
        if side != image.size:
            begins = f"images of {side} px, with which [{section}] progressive = {settings.progressive:g} begins"
            try_network(model, settings.model, side, f"{begins}; set it to 0")
        fits.append(fit_to_images(model.backbone, settings.model, origin, image))
    check_feature_layers(recipe.student.feature_layers, teacher[0], student[0], image.size)
    return fits


def try_network(model: PixelClassifier, name: str, size: int, what: str = "") -> None:
    """Predict one image on the processor. Raises `RecipeError` for a network that does not accept this size.

    `what` names it in the message, by default the setting of the recipe.
    """
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise RecipeError(
            f"model {name!r} does not accept {what or f'[image] size = {size}'} ({' '.join(str(error).split())[:200]})"
        ) from None

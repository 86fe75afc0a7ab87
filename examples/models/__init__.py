"""The networks that the trainers train, one file each; those of images by name."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from examples.models import basic_cnn, densenet, resnet, vit


def _classifier(make: Callable[..., nnx.Module], *choices: str) -> Callable:
    """Return `make` with the signature of all; `choices` are those that it has."""

    def classifier(
        shape: tuple[int, int, int] = (32, 32, 3),
        classes: int | None = None,
        *,
        cifar_stem: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> nnx.Module:
        if "shape" not in choices and shape[-1] != 3:
            raise ValueError(f"`shape` is {shape}; expected images of three channels.")
        given = {"shape": shape, "cifar_stem": cifar_stem}
        options = {name: given[name] for name in choices}
        if classes is not None:
            options["classes"] = classes
        return make(**options, dtype=dtype, rngs=rngs)

    return classifier


# name -> function (shape, classes, *, cifar_stem, dtype, rngs) that makes the network.
# Without `classes` it has ten, or the thousand of ImageNet if it was made for that, as
# in arXiv 2202.07052 on CIFAR-10 too. Those made for CIFAR-10 have one stem only.
CLASSIFIERS: dict[str, Callable[..., nnx.Module]] = {
    "basic_cnn": _classifier(basic_cnn.BasicCNN, "shape"),
    "resnet20": _classifier(resnet.resnet20),
    "resnet44": _classifier(resnet.resnet44),
    "resnet18": _classifier(resnet.resnet18, "cifar_stem"),
    "resnet34": _classifier(resnet.resnet34, "cifar_stem"),
    "resnet50": _classifier(resnet.resnet50, "cifar_stem"),
    "densenet121": _classifier(densenet.densenet121, "cifar_stem"),
    "densenet161": _classifier(densenet.densenet161, "cifar_stem"),
    "resnext50_32x4d": _classifier(resnet.resnext50_32x4d, "cifar_stem"),
    "wide_resnet50_2": _classifier(resnet.wide_resnet50_2, "cifar_stem"),
}


def _of_size(make: Callable[..., nnx.Module]) -> Callable:
    """Return `make` with the arguments of a network that takes images of any size."""
    return lambda image_size, classes, **options: make(classes, **options)


# name -> function (image_size, classes, *, dtype, rngs) of the networks for ImageNet.
IMAGENET: dict[str, Callable[..., nnx.Module]] = {
    "resnet18": _of_size(resnet.resnet18),
    "resnet34": _of_size(resnet.resnet34),
    "resnet50": _of_size(resnet.resnet50),
    "vit_s16": vit.vit_s16,
}

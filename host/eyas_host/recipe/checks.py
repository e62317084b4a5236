"""Combinations of settings that the types allow and that cannot work."""

from __future__ import annotations

from collections.abc import Iterable

from eyas_host.recipe import Recipe
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.training import training_errors
from eyas_host.support.addresses import WEB, address_error, is_url, scheme_of


def _address_errors(data: DataSection) -> Iterable[str]:
    """Addresses of images that cannot be used; none is quoted, because it may hold a password."""
    for source in data.sources:
        if not is_url(source.path):
            continue
        if problem := address_error(source.path):
            yield f"[data] path: the address {problem}"
        elif source.source == "csv":
            yield "[data] path: source = 'csv' is a table on this machine, not an address"
        elif source.source == "folder" and scheme_of(source.path) in WEB:
            yield "[data] path: a web server does not list its files; name tar shards (source = 'tar') or a store"
        elif source.source == "folder" and data.by == "folders":
            yield "[data] by = 'folders' needs a folder on this machine"


def combination_errors(recipe: Recipe) -> Iterable[str]:
    """Combinations of settings that cannot work, a line each."""
    data = recipe.data
    if abs(sum(data.split) - 1.0) > 1e-6 or min(data.split) <= 0:
        yield f"[data] split = {list(data.split)}: three fractions above 0 that add up to 1 are needed"
    if data.source == "folder" and not data.path:
        yield "[data] path: missing; source = 'folder' needs the folder of class folders"
    if data.source == "csv" and not data.path:
        yield "[data] path: missing; source = 'csv' needs the table path,label[,group,time,split]"
    if data.source == "tar" and not data.path:
        yield "[data] path: missing; source = 'tar' needs a tar file, a folder of them, or a pattern"
    yield from _address_errors(data)
    if data.source == "elpv" and data.path:
        yield "[data] path: source = 'elpv' takes its images from the extra `demo`, not from a path"
    if data.by in ("group", "time") and (data.source == "elpv" or any(one.source == "folder" for one in data.sources)):
        yield (
            f"[data] by = '{data.by}': source = 'csv' is needed, a table with the columns path,label,{data.by}, or "
            f"source = 'tar' with {data.by} in the KEY.json files"
        )
    if data.keep and data.limit:
        yield "[data] limit: draws other images for each limit, keep needs those of the former split; leave one out"
    if data.keep_missing and not data.keep:
        yield "[data] keep_missing belongs to keep, which is not set"
    if data.by != "time" and data.gap_days:
        yield f"[data] gap_days belongs to by = 'time', not to {data.by!r}"
    if (data.by == "folders" and any(one.source != "folder" for one in data.sources)) or (
        data.by == "folders" and data.source == "elpv"
    ):
        yield "[data] by = 'folders': source = 'folder' is needed, a folder with train/ and val/ or test/"
    if data.by == "column" and (data.source != "csv" or any(one.source != "csv" for one in data.sources)):
        yield "[data] by = 'column': source = 'csv' is needed, tables with the columns path,label,split"
    for key, given in (("fold", data.fold[1]), ("keep", data.keep), ("limit", data.limit)):
        if data.divided and given:
            yield f"[data] {key} cannot be used with by = {data.by!r}: the images are divided already"
    if data.by == "time" and data.fold[1]:
        yield "[data] fold: by = 'time' has no folds, training would see what comes after the test; leave one out"
    if not recipe.compile.runtimes or len(set(recipe.compile.runtimes)) != len(recipe.compile.runtimes):
        yield "[compile] runtimes: name at least one of litert, openvino, onnx, each once"
    fold, folds = data.fold
    if data.fold != (0, 0) and not (folds >= 2 and fold < folds):
        yield f"[data] fold = {list(data.fold)}: [k, n] with n of at least 2 folds and k from 0 to n - 1 is needed"
    prune = recipe.prune
    if prune.method == "channel" and prune.keep >= 1.0 and not (prune.target == "latency" and prune.ms):
        yield "[prune] keep = 1.0 prunes nothing: take method = 'none' or a fraction below 1"
    if prune.target != "latency" and (prune.ms or prune.table):
        yield f"[prune] ms and table belong to target = 'latency', not to {prune.target!r}"
    if prune.method == "nncf" and prune.sparsity == 0.0:
        yield "[prune] sparsity = 0 prunes nothing: take method = 'none' or a sparsity above 0"
    precisions = recipe.compile.precisions
    if not {"fp32", "int8"} <= set(precisions) or len(set(precisions)) != len(precisions):
        yield "[compile] precisions: fp32 and int8 are needed, int16 is optional, each once"
    if "int16" in precisions and "litert" not in recipe.compile.runtimes:
        yield "[compile] precisions: int16 needs litert in [compile] runtimes"
    if recipe.student.checkpoint and (recipe.prune.method != "none" or recipe.quantize.method != "ptq"):
        yield "[student] checkpoint trains nothing: set [prune] method = 'none' and [quantize] method = 'ptq'"
    if recipe.quantize.method == "qat" and not recipe.quantize.epochs:
        yield "[quantize] epochs = 0: take method = 'ptq' to skip training"
    if len(set(recipe.run.trackers)) != len(recipe.run.trackers):
        yield f"[run] trackers = {list(recipe.run.trackers)}: each once"
    if recipe.run.amp == "fp16" and recipe.run.device == "cpu":
        yield "[run] amp = 'fp16' needs a GPU, but device = 'cpu'; 'bf16' works there"
    if recipe.accept.min_recall is not None and not (recipe.accept.positive_class or recipe.cost.table):
        yield "[accept] min_recall: name its class in [accept] positive_class, or give a [cost] table"
    if recipe.accept.max_cost_ratio != 1.0 and not recipe.cost.table:
        yield "[accept] max_cost_ratio: needs a [cost] table"
    if recipe.image.size % 32:
        yield f"[image] size = {recipe.image.size}: must be a multiple of 32 (the networks downsample by 32)"
    processes = recipe.run.processes
    if isinstance(processes, int) and processes > 1 and recipe.student.batch < 2 * processes:
        yield (
            f"[run] processes = {processes}: [student] batch = {recipe.student.batch} has no 2 images for each, which "
            "BatchNorm needs"
        )
    if isinstance(processes, int) and recipe.teacher.batch < processes:
        yield f"[run] processes = {processes}: [teacher] batch = {recipe.teacher.batch} has no image for each"
    yield from training_errors(recipe.teacher, recipe.student)

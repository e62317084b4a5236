"""What the terms of the reports mean: each use links to its entry in the page's glossary, and shows it on hover."""

from __future__ import annotations

from markupsafe import Markup

TERMS: dict[str, tuple[str, str]] = {
    "interval": (
        "95 % interval",
        "Where the figure would lie on 95 of 100 other test sets of the same kind. Images of one group, and "
        "near-duplicates, count as one. It says nothing about another camera or season.",
    ),
    "test": ("held-out test set", "Images that nothing was trained on and nothing was chosen by; read to report only."),
    "validation": ("validation", "Images that nothing was trained on, but by which all choices were made."),
    "train": ("training images", "Images that the networks were trained on."),
    "split": ("split", "Training, validation or held-out test set; an image is in one of them only."),
    "images": ("images", "Number of images that a figure rests on."),
    "label": ("label", "A class of images, as the data names it."),
    "true_label": ("true label", "The label that the data gives the image."),
    "predicted_label": ("predicted label", "The label that the model gives the image."),
    "accuracy": ("accuracy", "Fraction of the images that are predicted correctly."),
    "balanced_accuracy": (
        "balanced accuracy",
        "Mean recall of the labels: each label counts the same, however rare it is. Guessing reaches 1 / labels.",
    ),
    "recall": ("recall", "Fraction of a label's images that are found. 100 % minus recall is the fraction missed."),
    "precision": ("precision", "Fraction of the predictions of a label that are right; the others are false alarms."),
    "f1": ("F1", "Harmonic mean of precision and recall, averaged over the labels. 1 is perfect."),
    "roc_auc": (
        "ROC-AUC",
        "Probability that an image of a label gets a higher probability of it than an image of another; 0.5 is chance, "
        "1 perfect. It depends on no threshold.",
    ),
    "pr_auc": (
        "PR-AUC",
        "Area under the curve of precision against recall (average precision). Chance is the label's fraction of the "
        "images, so it is the stricter figure for rare labels.",
    ),
    "brier": ("Brier score", "Mean squared error of the probabilities, summed over the labels: 0 is perfect, 2 worst."),
    "nll": (
        "NLL",
        "Negative log likelihood of the true labels, in nats: low where the true label is thought probable.",
    ),
    "ece": ("ECE", "Expected calibration error: mean gap between confidence and accuracy, in 15 bins."),
    "classwise_ece": (
        "class-wise ECE",
        "The same for the probability of every label, averaged: it shows whether a rare label's probability is true.",
    ),
    "confidence": ("confidence", "Calibrated probability of the predicted label."),
    "calibration": (
        "calibration",
        "Correction of the probabilities, softmax(logits / temperature + bias), fitted on validation, so that of the "
        "predictions with 80 % confidence 80 % are right.",
    ),
    "temperature": ("temperature", "Divides the logits: above 1 the network was too sure, below 1 not sure enough."),
    "bias": ("bias", "Added to a label's logit: corrects how frequent the network takes the label to be."),
    "cost": (
        "cost per image",
        "Mean cost of a prediction by the recipe's cost table; correct ones mostly cost nothing.",
    ),
    "decision_rule": (
        "decision rule",
        "How a prediction follows from the probabilities: with a cost table the label of least expected cost, else the "
        "largest logit.",
    ),
    "likeliest": ("most probable label", "The cost if the most probable label were always predicted."),
    "constant": ("constant prediction", "The cost if one label were predicted for every image: what no model costs."),
    "variant": ("variant", "One form of the model on its way from the teacher to what a device runs."),
    "teacher": ("teacher", "The large network, trained on the labels; the student learns from its predictions."),
    "student": ("student", "The small network, trained by distillation, in float."),
    "student-labels-only": ("student-labels-only", "The same small network trained without the teacher."),
    "distillation": ("distillation", "Training of the student on the teacher's probabilities instead of labels alone."),
    "pruned": ("pruned", "The student with fewer channels, trained again; the float model before quantization."),
    "qat": ("qat", "The pruned student in simulated int8, as quantization leaves it."),
    "exact-int8": ("exact-int8", "qat in exact integer arithmetic: no int8 artefact can be expected to be closer."),
    "artefact": ("artefact", "A compiled file that a device's runtime runs."),
    "shipped": ("shipped", "The artefact that the bundle's first runtime runs."),
    "runtime": ("runtime", "The library that runs the network on the device: LiteRT, OpenVINO or ONNX Runtime."),
    "number_format": ("number format", "fp32 is float; int8 stores weights and activations in 8 bits."),
    "int8": ("int8", "Weights and activations in 8 bits: a quarter of the size, faster, with rounding."),
    "gate": ("gate", "Bounds of the recipe on validation: an artefact that breaks one is not packed."),
    "agreement": ("agreement", "Fraction of the images with the same prediction as the network it was made from."),
    "made_from": ("made from", "The network that the artefact is compared with."),
    "dp": ("|dp|", "Absolute difference of a probability from that of the network it was made from."),
    "dlogit": ("|dlogit|", "Absolute difference of a logit, the network's output before it becomes a probability."),
    "drop": ("lost", "Balanced accuracy lost against the float model before quantization, on the same images."),
    "drop_bound": ("95 % bound", "The loss is below it with 95 % confidence."),
    "against_teacher": ("against the teacher", "Balanced accuracy, size and latency compared with the teacher's."),
    "size": ("size", "Bytes of the model's files."),
    "constants": ("constants", "Weights, biases and other fixed tensors of a file."),
    "graph": ("graph and the rest", "Operators, names, scales and other contents of a file."),
    "latency": ("latency", "Time from the prepared image to the logits; one image at a time, on the workstation."),
    "p50": ("p50 / p90", "Half, or nine of ten, of the images take at most this long."),
    "threads": ("threads", "Processor threads that the runtime may use."),
    "layer": ("layer", "A convolution or matrix of the network."),
    "weights": ("weights", "Shape of the layer's weight tensor."),
    "parameters": ("parameters", "Number of trained values."),
    "snr": ("SNR", "Signal-to-noise ratio of the logits, in decibels: what rounding adds is noise. Higher is better."),
    "nll_increase": ("NLL increase", "How much less probable the true labels become."),
    "confusion": (
        "confusion matrix",
        "How many images of each true label (row) were predicted as each label (column); right ones on the diagonal.",
    ),
    "fraction": ("of the label", "Fraction of all images of this true label."),
    "gradcam": (
        "Grad-CAM",
        "Where the evidence for a prediction lies in the image, by the gradient at the last convolution; bright is "
        "strong.",
    ),
    "roc": ("ROC curve", "Recall against the fraction of the other images called by mistake, over all thresholds."),
    "pr": ("precision-recall curve", "Precision against recall, over all thresholds."),
    "operating_point": ("operating point", "Where the bundle's decision rule lies on the curve."),
    "positive": ("positive class", "The class that must not be missed."),
    "change": ("change", "What was done to the images: light, colour, focus, noise, dirt or view."),
    "example": ("example", "A validation image after the change."),
    "wrong_confidence": ("confidence when wrong", "Mean confidence of the mistakes: high ones look like certainty."),
    "ood": ("out of distribution", "Unlike the training images, as judged by the device over a window of images."),
    "noticed": ("noticed", "Fraction of the windows that a device calls out of distribution."),
    "device_says": ("what the device says", "The most frequent reason that a device gives."),
    "stage": ("stage", "A step of the main job."),
    "result": ("result", "The stage's own summary."),
    "time": ("time", "Wall-clock time of the stage."),
    "memory": ("peak memory", "Largest resident memory (RSS) of the stage's process."),
    "pruning": ("pruning", "Removal of whole channels, then training to recover."),
    "macs": ("multiply-accumulates", "Multiplications with addition that one image takes: the amount of arithmetic."),
    "why": ("why", "Why the runtime runs this artefact: it is faster or smaller without losing accuracy."),
    "match": ("match", "Exact: the same file or pixels; near: almost the same image by its perceptual hash."),
    "uncertain": ("below the confidence threshold", "Predictions that a device reports as uncertain."),
}
"""Key -> the term as a page writes it, and what it means in a sentence or two."""


class Glossary:
    """The terms that one page uses, in the order of their entries."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def term(self, key: str, text: str = "") -> Markup:
        """A link to the entry of `key`; its text is the term unless `text` is given. `KeyError` without an entry."""
        name, meaning = TERMS[key]
        self._used.add(key)
        return Markup('<a class="term" href="#term-{}" title="{}">{}</a>').format(key, meaning, text or name)

    def known(self, key: str) -> Markup | str:
        """A link if `key` is a term, else the text itself: for names that are mostly terms."""
        return self.term(key) if key in TERMS else key

    def entries(self) -> list[tuple[str, str, str]]:
        """(key, term, meaning) of each term that was used until now, by name."""
        used = [(key, *TERMS[key]) for key in TERMS if key in self._used]
        return sorted(used, key=lambda entry: entry[1].casefold())

"""Rows of metrics.jsonl about everything but training steps and scores, their log lines and TensorBoard's tags."""

from typing import Any

Row = dict[str, Any]


def is_evaluation(row: Row) -> bool:
    """Whether a row holds a score of the model."""
    return any(kind in row for kind in ("validation", "task", "suite"))


def diagnostic_line(row: Row) -> str:
    """A row for people: terminal and train.log."""
    at = f"at iteration {row['iteration']}"
    if "evaluation_error" in row:
        return f" evaluation of {row['evaluation_error']} {at} failed, training goes on: {row['message']}"
    if "weight_update" in row:
        top, bottom, ratio = row["top"], row["bottom"], row["ratio"]
        return (
            f" weight update {at} | mean |dw|/|w0| of the {top['layers']} bottom layers: {bottom['mean_ratio']:.6E} | "
            f"of the top ones: {top['mean_ratio']:.6E} | bottom/top: {_number(ratio['mean'])} | bottom/top of norms: "
            f"{_number(ratio['norm'])} | time (ms): {1000 * row['seconds']:.1f} |"
        )
    if "gradient_probe" in row:
        cosines = ", ".join(_number(layer["cosine"], 3) for layer in row["gradient_probe"])
        return f" gradient probe {at} | cosine by layer: {cosines} | time (ms): {1000 * row['seconds']:.1f} |"
    told = "has fallen" if row["higher_is_better"] else "has risen"
    return f" guard {at} | {row['guard']} {told} by {row['drop']:.4f}, allowed are {row['max_drop']:g}: {row['action']}"


def diagnostic_scalars(row: Row) -> dict[str, float]:
    """TensorBoard's tags of a row."""
    if "weight_update" in row:
        values = {f"weight-update {end} mean": row[end]["mean_ratio"] for end in ("bottom", "top")}
        values |= {f"weight-update ratio {kind}": value for kind, value in row["ratio"].items() if value is not None}
        return values | {f"weight-update layer {x['layer']} mean": x["mean_ratio"] for x in row["weight_update"]}
    if "gradient_probe" in row:
        layers = row["gradient_probe"]
        return {f"gradient-cosine layer {x['layer']}": x["cosine"] for x in layers if x["cosine"] is not None}
    return {f"guard {row['guard']} drop": row["drop"]} if "guard" in row else {}


def _number(value: float | None, digits: int = 4) -> str:
    return "none" if value is None else f"{value:.{digits}f}"

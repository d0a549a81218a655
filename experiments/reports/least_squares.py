"""Least squares over logarithms: all constants are positive, and each step is relative."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Constants = Mapping[str, float]


def jacobian(of: Callable[[Constants], np.ndarray], at: Constants, r: np.ndarray) -> np.ndarray:
    """The effect of one percent of each constant on the residuals, by finite differences, one column per constant."""
    step = 0.01
    return np.stack([(of({**at, name: at[name] * np.exp(step)}) - r) / step for name in at], axis=1)


def gauss_newton(
    of: Callable[[Constants], np.ndarray],
    start: Constants,
    iterations: int = 12,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, float], np.ndarray]:
    """The least-squares constants, and the relative standard error of each.

    Damped as in Levenberg-Marquardt: a step that does not help is retried, shorter.
    """
    at, r, damping = dict(start), of(start), 1e-3
    for n in range(iterations):
        J = jacobian(of, at, r)
        while damping < 1e3:
            step = -np.linalg.solve(J.T @ J + damping * np.eye(len(at)), J.T @ r)
            tried = {name: at[name] * float(np.exp(np.clip(x, -0.5, 0.5))) for name, x in zip(at, step, strict=True)}
            new = of(tried)
            if new @ new < r @ r:
                break
            damping *= 10
        else:
            break
        gain, at, r, damping = 1 - (new @ new) / (r @ r), tried, new, damping / 10
        progress(f"least squares, step {n + 1}: {np.sqrt(r @ r / len(r)):.2%} root mean square")
        if gain < 1e-5:
            break
    J = jacobian(of, at, r)
    variance = r @ r / max(1, len(r) - len(at))
    return at, np.sqrt(np.diag(np.linalg.pinv(J.T @ J)) * variance)

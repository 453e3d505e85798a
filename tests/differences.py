"""Gradients by differences of the function itself."""

import numpy as np


def central_differences(loss, array, step=1e-5):
    """The gradient of loss() with respect to an array, which is changed and changed back."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        array[index] = value + step
        above = loss()
        array[index] = value - step
        below = loss()
        array[index] = value
        gradient[index] = (above - below) / (2 * step)
    return gradient

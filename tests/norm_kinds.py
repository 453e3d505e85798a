"""Kinds of data for the norms: what one is given, and what in it is normalised together."""

from functools import partial
from math import prod
from typing import NamedTuple

import numpy as np
from norms_table import BATCH, GROUP, INSTANCE, ROWS, Norm

from cbn import functional


class Kind(NamedTuple):
    """A norm, and the data that it is given."""

    norm: Norm
    shape: tuple[int, ...]
    channel_axis: int = 1  # as the norm is told; of a single sample the channels are first, or last
    groups: int = 1
    row: tuple[int, ...] = ()

    def __str__(self):
        groups = f"-{self.groups}" if self.norm is GROUP else ""
        return f"{self.norm.name}-{'x'.join(map(str, self.shape))}{groups}" + (
            "" if self.channel_axis == 1 else "-last"
        )

    @property
    def axis(self):
        """The axis of the channels in the shape."""
        return self.channel_axis if len(self.shape) in self.norm.axes else min(self.channel_axis, 0)

    @property
    def C(self):
        return self.shape[self.axis]

    @property
    def options(self):
        return {} if self.channel_axis == 1 else {"channel_axis": self.channel_axis}

    def layer(self, **options):
        return self.norm.layer(self.C, self.groups, self.row, **self.options, **options)

    def functions(self, module=functional):
        functions = self.norm.functions(self.groups, self.row, module)
        return [partial(function, **self.options) for function in functions]

    @property
    def parameter_shape(self):
        return self.norm.shape_of_parameters(self.C, self.row)

    def by_group(self, array):
        """The array with a row for each group of values that are normalised together."""
        first, groups = 1, len(array) * self.groups
        if self.norm in BATCH:
            first, groups = 0, self.C
        elif self.norm in INSTANCE:
            groups = len(array) * self.C
        elif self.norm in ROWS:
            groups = array.size // prod(self.row)
        return np.moveaxis(array, self.axis, first).reshape(groups, -1)

    def by_parameter(self, array):
        """The array with a row for every time that all weights are used."""
        last = array if self.norm in ROWS else np.moveaxis(array, self.axis, -1)
        return last.reshape(-1, *self.parameter_shape)

    def from_groups(self, groups):
        """The other way round than by_group."""
        places = self.by_group(np.arange(prod(self.shape)).reshape(self.shape))
        array = np.empty(self.shape, groups.dtype)
        array.flat[places] = groups
        return array


def channels_last(kind):
    """The same kind of data with the channels last."""
    shape = list(kind.shape)
    shape.append(shape.pop(kind.axis))
    return kind._replace(shape=tuple(shape), channel_axis=-1)


def kinds(batches=(), unbatched=(), rows=(), groups=(), instances=()):
    """Norms of data of these shapes, channels first; then those that have both layouts, last."""
    first = [Kind(BATCH[max(len(shape) - 3, 0)], shape) for shape in batches]
    first += [Kind(BATCH[len(shape) - 2], shape) for shape in unbatched]
    first += [Kind(GROUP, shape, groups=number) for shape, number in groups]
    first += [Kind(INSTANCE[0], shape) for shape in instances]
    of_rows = [Kind(norm, shape, row=shape[1:]) for shape in rows for norm in ROWS]
    return [*of_rows, *first, *map(channels_last, first)]

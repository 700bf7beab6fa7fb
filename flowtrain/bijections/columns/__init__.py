"""The links of a table's flow: from rows in the units of the file to real numbers near 0.

Each is a layer with numbers for every column, buffers that :func:`fit_to_columns` sets from the train split.
"""

from flowtrain.bijections.columns.angles import CircleToLine, Turns
from flowtrain.bijections.columns.bound import BoundColumns
from flowtrain.bijections.columns.column_bijection import ColumnBijection, fit_to_columns
from flowtrain.bijections.columns.dequantize import DequantizeColumns
from flowtrain.bijections.columns.fill import FillMissing
from flowtrain.bijections.columns.quantile import QuantileColumns
from flowtrain.bijections.columns.standardize import Standardize

__all__ = [
    "BoundColumns",
    "CircleToLine",
    "ColumnBijection",
    "DequantizeColumns",
    "FillMissing",
    "QuantileColumns",
    "Standardize",
    "Turns",
    "fit_to_columns",
]

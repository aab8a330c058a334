"""Bars of a test's project, prepared as the first stage does it: no command does that by the way."""

from trading_lib.config import load_parameters
from trading_lib.pipeline.prepare import prepare_symbol
from trading_lib.pipeline.project import artefacts


def prepare(*symbols: str):
    "Prepare these symbols of the project that we are in; none: all of them."
    parameters = load_parameters()
    for symbol in symbols or parameters.symbols:
        prepare_symbol(parameters, symbol, artefacts(parameters, symbol))

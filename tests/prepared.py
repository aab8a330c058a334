"""Bars of a test's project, prepared as the first stage does it: no command does that by the way."""

from trading_lib.config import load_parameters
from trading_lib.pipeline.prepare import prepare_symbol
from trading_lib.pipeline.project import artefacts


def prepare():
    "Prepare each symbol of the project that we are in."
    parameters = load_parameters()
    for symbol in parameters.symbols:
        prepare_symbol(parameters, symbol, artefacts(parameters, symbol))

"""What every rank of a multi-rank test imports; loaded once into the server from which ranks are forked."""

import warnings

warnings.simplefilter("ignore")

import megacpt.train.build  # noqa: E402
import megacpt.train.loop  # noqa: E402
import megacpt.train.planning  # noqa: E402, F401

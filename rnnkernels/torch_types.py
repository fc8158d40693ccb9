"""The layers and cells once more, as instances of torch.nn's classes too.

``isinstance(layer, torch.nn.LSTM)`` is true of :class:`rnnkernels.torch_types.LSTM` and false of
:class:`rnnkernels.LSTM`; there is no other difference. Code that looks for torch.nn's types
(initialisation by type, exporters, wrappers that check what they are given) takes them, and our
kernels run them. ``rnnkernels.convert(model, keep_type=True)`` puts them in place.

``torch.compile`` refuses every instance of ``torch.nn.RNN``, ``LSTM`` and ``GRU`` by its type, as
it refuses torch.nn's own: the graph breaks there, and ``fullgraph=True`` is an error, unless
``torch._dynamo.config.allow_rnn = True``. The cells compile.

Example::

    lstm = rnnkernels.torch_types.LSTM(10, 20)
    assert isinstance(lstm, torch.nn.LSTM)
    y, (h_n, c_n) = lstm(torch.randn(5, 3, 10))  # y [5, 3, 20], h_n and c_n [1, 3, 20]
"""

from __future__ import annotations

from torch import nn

from rnnkernels.nn import cells as cell_modules
from rnnkernels.nn import layers as modules

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


class RNN(modules.RNN, nn.RNN):
    """:class:`rnnkernels.RNN` that is a :class:`torch.nn.RNN`; same arguments, shapes, errors."""


class LSTM(modules.LSTM, nn.LSTM):
    """:class:`rnnkernels.LSTM` that is a :class:`torch.nn.LSTM`; same arguments, shapes, errors."""


class GRU(modules.GRU, nn.GRU):
    """:class:`rnnkernels.GRU` that is a :class:`torch.nn.GRU`; same arguments, shapes, errors."""


class RNNCell(cell_modules.RNNCell, nn.RNNCell):
    """:class:`rnnkernels.RNNCell` that is a :class:`torch.nn.RNNCell`; same arguments, shapes,
    errors."""


class LSTMCell(cell_modules.LSTMCell, nn.LSTMCell):
    """:class:`rnnkernels.LSTMCell` that is a :class:`torch.nn.LSTMCell`; same arguments, shapes,
    errors."""


class GRUCell(cell_modules.GRUCell, nn.GRUCell):
    """:class:`rnnkernels.GRUCell` that is a :class:`torch.nn.GRUCell`; same arguments, shapes,
    errors."""


Table = dict[type[nn.Module], type[nn.Module]]

#: What stands for each of torch.nn's classes.
OURS: Table = {
    nn.RNN: modules.RNN,
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNNCell: cell_modules.RNNCell,
    nn.LSTMCell: cell_modules.LSTMCell,
    nn.GRUCell: cell_modules.GRUCell,
}

#: The same where the type is kept.
KEEPING: Table = {
    nn.RNN: RNN,
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNNCell: RNNCell,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
}

#: torch.nn's class for each of ours.
THEIRS: Table = {ours: theirs for table in (OURS, KEEPING) for theirs, ours in table.items()}

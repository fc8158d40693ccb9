"""Layers and steps of gated cells that torch.nn has not, each written as users write theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import softplus

from rnnkernels.cells.parameters import per_unit
from rnnkernels.nn.defined import DefinedLayer, DefinedStep, cell


@cell
def mgu(f: Any, n: Any, *, h: Any) -> Any:
    f = torch.sigmoid(f)
    n = torch.tanh(n.x + f * n.h)
    return (1 - f) * h + f * n


@cell
def cifg(i: Any, g: Any, o: Any, *, h: Any, c: Any) -> Any:
    i = torch.sigmoid(i)
    c = (1 - i) * c + i * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


@cell
def peephole_lstm(
    i: Any,
    f: Any,
    g: Any,
    o: Any,
    *,
    h: Any,
    c: Any,
    p_i: Any = per_unit,
    p_f: Any = per_unit,
    p_o: Any = per_unit,
) -> Any:
    i, f = torch.sigmoid(i + p_i * c), torch.sigmoid(f + p_f * c)
    c = f * c + i * torch.tanh(g)
    return torch.sigmoid(o + p_o * c) * torch.tanh(c), c


_UP_TO_ONE = per_unit(nn.init.uniform_)


@cell
def ind_rnn(a: Any, *, h: Any, u: Any = _UP_TO_ONE) -> Any:
    return torch.relu(a.x + u * h)


@cell
def slstm(i: Any, f: Any, z: Any, o: Any, *, h: Any, c: Any, n: Any, m: Any) -> Any:
    kept = m - softplus(-f)  # log(exp(m) sigmoid(f)): what of the past is kept, unscaled
    start = n == 0
    m = torch.where(start, i, torch.maximum(i, kept))
    i, f = torch.exp(i - m), torch.exp(torch.clamp(kept - m, max=0))
    c, n = f * c + i * torch.tanh(z), f * n + i
    return torch.sigmoid(o) * c / n, c, n, m


class MGU(DefinedLayer):
    """Layers of minimal gated units (Zhou et al. 2016, "Minimal gated unit for recurrent neural
    networks"), of one gate that both forgets and resets::

        f  = sigmoid(W_if x + b_if + W_hf h + b_hf)
        n  = tanh(W_in x + b_in + f * (W_hn h + b_hn))
        h' = (1 - f) * h + f * n

    The gate is taken after the recurrent product, as in :class:`torch.nn.GRU`; the paper multiplies
    h by it before. Rows of the weights are in the order f, n.

    Arguments, options, calls, shapes and errors are those of :class:`rnnkernels.GRU`; when
    kernels are compiled: docs/cells.md.
    """

    definition = mgu


class MGUCell(DefinedStep):
    """One step of :class:`MGU`; arguments, call, shapes, errors as :class:`rnnkernels.GRUCell`."""

    definition = mgu


class CIFG(DefinedLayer):
    """Layers of LSTM with coupled input and forget gates (Greff et al. 2017, "LSTM: a search space
    odyssey"), without its peepholes::

        i  = sigmoid(W_ii x + b_ii + W_hi h + b_hi)
        g  = tanh(W_ig x + b_ig + W_hg h + b_hg)
        o  = sigmoid(W_io x + b_io + W_ho h + b_ho)
        c' = (1 - i) * c + i * g
        h' = o * tanh(c')

    Rows of the weights are in the order i, g, o.

    Arguments, options, calls, shapes and errors are those of :class:`rnnkernels.LSTM`; when
    kernels are compiled: docs/cells.md.
    """

    definition = cifg


class CIFGCell(DefinedStep):
    """One step of :class:`CIFG`; arguments, call, shapes and errors as
    :class:`rnnkernels.LSTMCell`."""

    definition = cifg


class PeepholeLSTM(DefinedLayer):
    """Layers of LSTM whose gates look at c (Gers and Schmidhuber 2000, "Recurrent nets that time
    and count")::

        i  = sigmoid(W_ii x + b_ii + W_hi h + b_hi + p_i * c)
        f  = sigmoid(W_if x + b_if + W_hf h + b_hf + p_f * c)
        g  = tanh(W_ig x + b_ig + W_hg h + b_hg)
        c' = f * c + i * g
        o  = sigmoid(W_io x + b_io + W_ho h + b_ho + p_o * c')
        h' = o * tanh(c')

    The peepholes p_i, p_f and p_o are ``weight_p_i_l0`` and so on, ``[hidden_size]`` each. Rows of
    the other weights are in the order i, f, g, o.

    Arguments, options, calls, shapes and errors are those of :class:`rnnkernels.LSTM`; when
    kernels are compiled: docs/cells.md.
    """

    definition = peephole_lstm


class PeepholeLSTMCell(DefinedStep):
    """One step of :class:`PeepholeLSTM`, with ``weight_p_i`` and so on; arguments, call, shapes and
    errors as :class:`rnnkernels.LSTMCell`."""

    definition = peephole_lstm


class IndRNN(DefinedLayer):
    """Layers whose units know of each other through the layer above alone (Li et al. 2018,
    "Independently recurrent neural network (IndRNN)")::

        h' = relu(W_ih x + b_ih + u * h)

    There is neither a ``weight_hh`` nor a ``bias_hh``; u is ``weight_u_l0`` and so on,
    ``[hidden_size]``, and begins uniform between 0 and 1.

    Arguments, options, calls, shapes and errors otherwise are those of :class:`rnnkernels.GRU`;
    when kernels are compiled: docs/cells.md.
    """

    definition = ind_rnn


class IndRNNCell(DefinedStep):
    """One step of :class:`IndRNN`, with ``weight_u``; arguments, call, shapes and errors otherwise
    as :class:`rnnkernels.GRUCell`."""

    definition = ind_rnn


class SLSTM(DefinedLayer):
    """Layers of sLSTM (Beck et al. 2024, "xLSTM: extended long short-term memory", section 2.2),
    with an exponential input gate, a normaliser n and a stabiliser m::

        i_ = W_ii x + b_ii + W_hi h + b_hi
        f_ = W_if x + b_if + W_hf h + b_hf
        z  = tanh(W_iz x + b_iz + W_hz h + b_hz)
        o  = sigmoid(W_io x + b_io + W_ho h + b_ho)
        m' = max(i_, m + log(sigmoid(f_)))
        i  = exp(i_ - m')
        f  = exp(m + log(sigmoid(f_)) - m')
        c' = f * c + i * z
        n' = f * n + i
        h' = o * c' / n'

    The forget gate is the sigmoid of the paper's two. Where nothing has been remembered yet, which
    is where n is 0, as at the beginning and behind a reset, m' is ``i_``. Rows of the weights are
    in the order i, f, z, o, as in the package ``xlstm``, which has one bias:
    ``bias_mode='single'``.

    ``hx`` and the last states are ``(h, c, n, m)``, ``[L*D, B, H]`` each. Arguments, options, calls
    and errors otherwise are those of :class:`rnnkernels.LSTM`; when kernels are
    compiled: docs/cells.md.
    """

    definition = slstm


class SLSTMCell(DefinedStep):
    """One step of :class:`SLSTM`, with ``(h, c, n, m)``, ``[B, H]`` each, as ``hx`` and result;
    arguments, call and errors otherwise as :class:`rnnkernels.LSTMCell`."""

    definition = slstm

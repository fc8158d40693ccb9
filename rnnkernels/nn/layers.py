"""The layers as modules: the surface of ``torch.nn.RNN``, ``LSTM`` and ``GRU``, and more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch
from torch import nn

from rnnkernels._core import option_checks
from rnnkernels.nn.base import RNNBase
from rnnkernels.nn.options import Options, known, spelled_out

if TYPE_CHECKING:  # what calls return
    from rnnkernels.nn.options import OneState, TwoStates
else:
    OneState = TwoStates = RNNBase


class RNN(OneState):
    """Elman RNN, a drop-in for :class:`torch.nn.RNN`: ``h' = f(W_ih x + b_ih + W_hh h + b_hh)``.

    Arguments, shapes and errors are those of :class:`LSTM` without ``proj_size``; ``hx`` is h_0
    alone. ``nonlinearity`` is ``'tanh'``, ``'relu'`` or ``'sigmoid'``.

    Example::

        rnn = rnnkernels.RNN(10, 20, num_layers=2, nonlinearity="relu")
        y, h_n = rnn(torch.randn(5, 3, 10))  # y [5, 3, 20], h_n [2, 3, 20]
    """

    @spelled_out(RNNBase)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        _refuse(type(self), options)
        self.nonlinearity = option_checks.nonlinearity(nonlinearity)
        super().__init__(
            "RNN_" + nonlinearity.upper(),
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            **options,
        )


class GRU(OneState):
    """GRU, a drop-in for :class:`torch.nn.GRU`, whose formula it takes (Cho et al. 2014, with the
    reset gate after the recurrent product).

    Arguments, shapes and errors are those of :class:`LSTM` without ``proj_size``; ``hx`` is h_0
    alone. ``layer_norm`` is that of the same paper, where r and z have one norm together and n has
    one for itself, of each product, in front of the reset gate: ``r, z = LN(W_ih x) + LN(W_hh h) +
    b_ih + b_hh`` over 2*H numbers, ``n = tanh(LN(W_in x) + b_in + r * (LN(W_hn h) + b_hn))`` over
    H. ``weight_norm_ih_l0`` and the others ``[3*H]`` have rows as ``weight_ih_l0`` has; there is no
    norm of a c.

    Example::

        gru = rnnkernels.GRU(10, 20, bidirectional=True, merge_mode="sum")
        y, h_n = gru(torch.randn(5, 3, 10), lengths=[5, 2, 0])  # y [5, 3, 20], h_n [2, 3, 20]
    """

    @spelled_out(RNNBase)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        _refuse(type(self), options)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            **options,
        )


class LSTM(TwoStates):
    """LSTM, a drop-in for :class:`torch.nn.LSTM`, whose formula it takes (Hochreiter and
    Schmidhuber 1997; forget gate of Gers et al. 2000; projection of Sak et al. 2014).

    T is time, B batch, I ``input_size``, H ``hidden_size``, L ``num_layers``, D the number of
    directions, R the size of h: ``proj_size`` where it is not zero, else H.

    Args:
        input_size: I, the features of a step.
        hidden_size: H, the units of a layer.
        num_layers: L, each layer taking the output of the one below.
        bias: whether there are biases.
        batch_first: whether input and output are ``[B, T, ...]``; states never are.
        dropout: probability of zeroing an output between layers, in training.
        bidirectional: whether a second direction runs from each row's end to its start.
        proj_size: size of the projected h; 0 for none.
        device, dtype: of the parameters; dtype is floating point.
        bias_mode: ``'double'`` as in torch, or ``'single'``: one bias vector per layer and
            direction.
        merge_mode: how both directions become one output: ``'concat'``, ``'sum'``, ``'mean'`` or
            ``'mul'``.
        backend: see :func:`rnnkernels.use_backend`; None for the automatic choice.
        truncate: truncated BPTT. With ``k``, no gradient flows from one window of k steps
            ``[0, k), [k, 2k), ...`` into the window before, as if the state had been detached
            there; all windows run through backward at once. With ``(k1, k2)``, k2 >= k1, the
            losses of each block of k1 steps flow back over the last k2 steps that end with the
            block (BPTT(h; h') of Williams and Peng 1990), not for bidirectional layers. None for
            full BPTT. Results are the same bits in any case.
        grad_clip: a bound b on the gradients g of the gates' pre-activations at every step of
            backward (Graves 2013, section 2.1): ``b`` or ``('value', b)`` for
            ``max(-b, min(b, g))``, ``('norm', b)`` for ``g * min(1, b / |g|)`` over all gates of a
            row, ``('tanh', b)`` for ``b * tanh(g / b)``. None for no bound.
        recompute: less memory for backward. With ``k``, only the states of every k-th step are
            kept, and backward computes the rest again, a window of k steps at a time
            (checkpointing, Chen et al. 2016): docs/recompute.md. Gradients are the same but for
            the order of sums. None to keep everything.
        heads: into how many heads the hidden units are parted, which divide H and share the input
            alone: the recurrent weights are a block for each head. Rows of the parameters stand
            head by head, and in each in torch's order: with Hh = H / heads, ``weight_ih_l0`` is
            ``[heads*G*Hh, I]``, ``weight_hh_l0`` ``[heads*G*Hh, Hh]``; ``w.view(heads, G, Hh, -1)
            .transpose(0, 1)`` has the gates in front, as torch.nn has them. Outputs and states
            have the units of all heads, head by head. ``grad_clip`` by norm takes each head for
            itself. Not with ``proj_size``.
        weight_drop: in training, the probability of zeroing a number of a ``weight_hh``, once for
            all steps of a call and all rows of its batch; the others are divided by
            ``1 - weight_drop`` (Merity et al. 2018).
        recurrent_dropout: in training, the probability of zeroing a number of the h that
            ``weight_hh`` is multiplied by, the same units of a row at all steps of a call; the
            others are divided by ``1 - recurrent_dropout`` (Gal and Ghahramani 2016, with one mask
            for all gates). Where a cell reads h otherwise, as a GRU in ``z * h``, and in the
            output, h is whole.
        input_dropout: in training, the probability of zeroing a feature of the input of each
            layer, the same features of a row at all steps of a call; the others are divided by
            ``1 - input_dropout`` (Gal and Ghahramani 2016). Between layers it comes beside
            ``dropout``, which draws for every step anew.
        zoneout: the probability with which each unit of a state keeps its value for a step
            (Krueger et al. 2017): in training ``d * c + (1 - d) * c~`` takes the place of the next
            c~, d being 1 with probability p and else 0, and so for h, which is made of c~; in
            evaluation d is p. A number p, or one for each state, ``(p_h, p_c)``, from 0 up to 1.
            docs/cells.md has more. None for no zoneout.
        layer_norm: whether products and c are normalised (Ba, Kiros and Hinton 2016, "Layer
            normalization", supplementary material): ``gates = LN(W_hh h; hh) + LN(W_ih x; ih) + b``
            with ``b = b_ih + b_hh``, c as ever, and ``h = o * tanh(LN(c; c))``. A norm ``LN(v) =
            weight * (v - mean) / sqrt(variance + 1e-5) + bias`` runs over all G*H numbers of a
            product, or all H of c, and has parameters as :class:`torch.nn.LayerNorm` has them,
            behind the others of each layer and direction: ``weight_norm_ih_l0``,
            ``bias_norm_ih_l0``, ``weight_norm_hh_l0``, ``bias_norm_hh_l0`` ``[G*H]`` and
            ``weight_norm_c_l0``, ``bias_norm_c_l0`` ``[H]``. ``grad_clip`` bounds the gradients of
            the sums of gates. Not with ``heads`` or ``zoneout``; on a GPU the reference runs it.

    Call:
        ``lstm(input, hx=None, *, lengths=None, reset=None, return_all_states=False,
        truncate=..., grad_clip=..., recompute=...)``

        * ``input``: ``[T, B, I]``, ``[B, T, I]`` with batch_first, ``[T, I]``, or a
          PackedSequence. T and B may be 0. With batch_first also a nested tensor ``[B, j, I]``
          with ``layout=torch.jagged``, whose offsets are the lengths, and which outputs and every
          state of a step are like. DTensors where the parameters are: docs/design.md.
        * ``hx``: ``(h_0 [L*D, B, R], c_0 [L*D, B, H])``, without B for unbatched input; zeros
          if None.
        * ``lengths``: ``[B]`` integers from 0 to T, in any order, on any device: row b ends
          after ``lengths[b]`` steps. The output is zero past the end, the final state is the one
          at the end, and what stands in the padding is never read. On a device other than the
          CPU the values are clamped to [0, T] instead of checked.
        * ``reset``: bool, the input's shape without features, nested like it: the state is zeroed
          before x_t is consumed, and no gradient passes there. In the reverse direction the cut
          falls on the same boundary.
        * ``return_all_states``: whether to return :class:`rnnkernels.AllStates` third.
        * ``truncate``, ``grad_clip``, ``recompute``: for this call, in place of the constructor's.

    Returns:
        ``(output, (h_n, c_n))``: output ``[T, B, D*R]`` (``[T, B, R]`` if merged, in the form of
        the input), h_n ``[L*D, B, R]``, c_n ``[L*D, B, H]``.

    Raises:
        TypeError: an argument is of the wrong type, ``hx`` is no pair, lengths are not integers.
        ValueError: an argument is out of range; input of a wrong number of dimensions or dtype.
        RuntimeError: input, states or parameters of the wrong shape or device.
        NotImplementedError: a complex dtype.

    Example::

        lstm = rnnkernels.LSTM(10, 20, num_layers=2)
        y, (h_n, c_n) = lstm(torch.randn(5, 3, 10))  # y [5, 3, 20], h_n and c_n [2, 3, 20]
    """

    @spelled_out(RNNBase)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        known(type(self), options)
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            **options,
        )

    # torch gives LSTM its own versions of these, for a pair of states.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]


def _refuse(cls: type, options: Options) -> None:
    if "proj_size" in options:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    known(cls, options)

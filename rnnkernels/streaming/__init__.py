"""Long sequences in pieces: for training loops that step their optimiser after every chunk, and for
servers whose streams come in chunks.

A language model that reads eight streams of one text side by side::

    tokens = streaming.batchify(text, 8)  # [T + 1, 8]
    inputs, targets = tokens[:-1], tokens[1:]
    resets = streaming.starts(inputs, end=end_of_document)
    hx = None
    for x, y, reset in streaming.chunks((inputs, targets, resets), 32):
        output, hx = lstm(embedding(x), hx, reset=reset)
        cross_entropy(head(output).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        hx = streaming.detach(hx)

A server that keeps the state of every client and is called from any of its threads::

    runner = streaming.StreamRunner(lstm.eval(), max_streams=1000)
    y = runner(client, chunk)  # [T, I] to [T, R], from where this client's last chunk ended
    ys = runner.batch({client: chunk, other: longer})  # several clients in one call of the layer
    runner.close(client)
"""

from rnnkernels.streaming._chunks import batchify, chunks, detach, starts
from rnnkernels.streaming._runner import StreamLimitError, StreamRunner

__all__ = ["StreamLimitError", "StreamRunner", "batchify", "chunks", "detach", "starts"]

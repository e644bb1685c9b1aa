"""Exact class-parallel training of recognition models: the map.

A module imports only modules of lower levels; ``tests/test_architecture.py`` reads this drawing and checks
it. In brackets: the heavy package that only this module imports. Start reading at ``loop``, then ``head``.

level 6
    loop           a run from configuration to result: train() on one screen
    compare        finished runs side by side: one table, one picture
level 5
    sheet          what a run is about to do, told before it starts
level 4
    state          all that changes while training: built, saved, restored
    benchmark      what the head costs on this machine, in time and memory
level 3
    packing        from a source to a finished data set: in several processes, resumable
    check          is a packed data set what its index says, to the last pixel?
    fused          the head at its limit: no logits, no normalised copy, no dense gradient
    preflight      before renting hours: are all hosts alike, healthy and connected?
    plan           memory, traffic and time for K classes on N GPUs, before renting them
    textbook       the class-parallel head as usually written: what the benchmark compares with
    engine         the backbone's engine, its configuration and its state [deepspeed]
    joint          one optimizer step of two parts: backbone inside the engine, head outside
    checkpoint     a run on disk: whole or absent, read on any number of ranks
    evaluate       a model on test sets: all ranks embed, all share the comparisons
    log            what a run tells: console, metrics.jsonl, log.txt and W&B [wandb]
level 2
    sources        where images come from before they are packed: one file per family of data sets
    head           the class-parallel head: exact softmax over rows cut over the ranks
    options        YAML and command line to Config and back; help and reference page [yaml]
    backbone       a name to a network from images to embeddings [timm]
    data           batches from an index, the same on any number of ranks and workers
    shards         data shards: written as tars, or indexed where they are [webdataset]
    optimizer      the optimizer of backbone and head, its state allocated at once
    figures        pictures of an evaluation and of a run [matplotlib]
level 1
    config         every option of a run: typed, checked, documented once [pydantic]
    distributed    which rank am I, on which device, with whom [torch.distributed]
    margins        softmax losses of cosines: what each changes in the COCO loss
    passes         what the two passes of the fused head hand to each other, and their buffers
    headcost       what a step of the fused head costs, from its shapes and a speed
    rows           one optimizer step on some rows of a matrix, stored in bfloat16 if asked
    batchnorm      batch norm over the images of all ranks
    metrics        how good features are: accuracy, verification, identification
    index          where every sample of a packed data set lies: found with one read
    tars           what is in a tar of samples, told from its headers, which may be hostile
    recordio       InsightFace's .rec and .idx
    pickles        the pickles of foreign data sets, read without unpickling
    jobs           independent pieces of work in several processes
    elastic        start a run again with the hosts that are left
level 0
    collectives    every tensor that travels between ranks in a step, with its gradient [torch.distributed]
    augment        from the bytes of an image to the tensor that is sent to the device
    order          in which order samples are seen: a function of seed and epoch
    machines       accelerators by their data sheets
    networks       networks of the papers that timm does not have
    scale          the scale alpha of the cosine softmax: its rules
    heartbeat      who is still there: names the ranks that a failed run lost
    schedule       the learning rate by step
    errors         the one error that is the user's to mend
"""

__version__ = "0.1.0"

"""Exact class-parallel training of recognition models: the map.

A module imports only modules of lower levels; ``tests/test_architecture.py`` reads this drawing and checks
it, a folder as one module. In brackets: the heavy package that only this module imports. Start reading at
``loop``, then ``head``.

level 8
    loop            a run from configuration to result: train() on one screen
level 7
    noise           which training images are probably of somebody else, by sub-centroids
    compare         finished runs side by side: one table, one picture
    benchmark_train what a step of training costs, whole and beside the plain loop
    benchmark_judge what judging costs on this machine: all pairs, a million distractors
    report          what a run learned and where it errs, as one file for a browser
level 6
    evaluate        a model on test sets: all ranks embed, all share the comparisons
    update          what every step has around the joint step: randomness, rate, an eye on its numbers
    models          a trained model wherever it lies: opened, judged by a protocol, made to embed
    warm_start      where a new run's weights come from, if not from the seed
    resume          going on from a checkpoint: which one, whether this run may, what has changed
    sheet           what a run is about to do, told before it starts
    classes         other classes for a checkpoint: grown, dropped, merged, matched by name
    export          a trained model for use elsewhere: timm, ONNX, torch.export, centroids, card
level 5
    benchmark_save  what a checkpoint costs: how long training stands still, memory to load one
    judge           a model judged by a protocol: sets are embedded, figures come out
    state           all that changes while training: built, saved, restored
    preflight       before renting hours: are all hosts alike, healthy and connected?
    class_means     the mean feature of every class in one pass: where a centroid best begins
    gallery         the images of a report: hardest pairs, nearest neighbours, examples of classes
    trained         a trained model as it lies on disk: backbone, rows, names of the classes
level 4
    saving          checkpoints written by all ranks together: whole or absent, behind training if asked
    bench           what every protocol works with: model, embedded sets, figures with intervals
    benchmark       what the head costs on this machine, in time and memory
    feed            from a configuration to training data: opened, ordered, the same on all ranks
    plansheet       the plan for programs and for people: one tree, one table
    study           one recipe, many rows and seeds: run what is missing, one table with a paired test
    log             what a run tells: console, metrics.jsonl, log.txt and W&B [wandb]
level 3
    cache           remote data sets: index at once, shards when first read, kept on the node
    packing         from a source to a finished data set: in several processes, resumable
    check           is a packed data set what its index says, to the last pixel?
    losses          losses of whole batches beside the class softmax, and weighted sums of them
    stream          batches from shards without an index: what it promises, and what not
    databench       what reading and decoding cost, beside webdataset and PIL
    fused           the head at its limit: no logits, no normalised copy, no dense gradient
    plan            memory, checkpoints, traffic and time for K classes on N GPUs, before renting them
    textbook        the class-parallel head as usually written: what the benchmark compares with
    engine          the backbone's engine, its configuration and its state [deepspeed]
    joint           one optimizer step of two parts: backbone inside the engine, head outside
    checkpoint      a run on disk: what it is made of, read on any number of ranks
    album           photo albums in PIPA's files: the regions of a person, cut out
    embed           embeddings of image sets: in memory, as a stream, or in files for millions
    pictures        losses side by side and over time, centres, the bounds of alpha [matplotlib]
    options         YAML and command line to Config and back; help and reference page [yaml]
level 2
    tensorfile      a safetensors file written as a stream, hashed on its way
    sources         where images come from before they are packed: one file per family of data sets
    head            the class-parallel head: exact softmax over rows cut over the ranks
    backbone        a name to a network from images to embeddings [timm]
    data            batches from an index, the same on any number of ranks and workers
    consistency     combinations of options that cannot work, refused in one line each
    mixture         several packed data sets that are read as one
    remote_index    the index of a remote data set, fetched and verified
    shards          data shards: written as tars, or indexed where they are [webdataset]
    optimizer       the optimizer of backbone and head, its state allocated at once
    figures         pictures of an evaluation and of a run [matplotlib]
    rays            embeddings of 2 or 3 dimensions, with a ray for every class [matplotlib]
    metrics         how good features are: accuracy, verification, identification
    imagesets       images to be judged, packed or in a folder, their keys and notes
    protocols       published ways to judge features, one file each, beside its definition
    headcost        what a step of the fused head costs, from its shapes and a speed
level 1
    diagnostics     near centroids, weak classes, effective rank: a head and its embeddings from inside
    health          are weights equal and numbers finite on all ranks; and what if not
    ledger          samples that could not be used: written down, limited, skipped when known
    samplers        which sample is at which position: shuffled, balanced, weighted, mixed
    config          every option of a run: typed, checked, documented once [pydantic]
    distributed     which rank am I, on which device, with whom [torch.distributed]
    margins         softmax losses of cosines: what each changes in the COCO loss
    passes          what the two passes of the fused head hand to each other, and their buffers
    rows            one optimizer step on some rows of a matrix, stored in bfloat16 if asked
    manifest        a checkpoint as files: its name, its record, the hashes that make damage visible
    batchnorm       batch norm over the images of all ranks
    tiles           pairs of images in tiles: exact cosines, shared by the ranks
    canvas          what every picture is drawn on, and its ways to a file or a page [matplotlib]
    index           where every sample of a packed data set lies: found with one read
    decode          from the bytes of an image to its pixels
    tars            what is in a tar of samples, which may be hostile
    recordio        InsightFace's .rec and .idx
    pickles         the pickles of foreign data sets, read without unpickling
    folders         the files below a folder, links followed: for packing and for judging alike
    jobs            independent pieces of work in several processes
    locks           locks that the processes of a node share, with an end to waiting
    remote          a remote file to a local one: whole and verified, or an error in bounded time
    elastic         start a run again with the hosts that are left
level 0
    hardpairs       the images a model finds hardest: one class yet far apart, two yet close
    collectives     every tensor that travels between ranks in a step, with its gradient [torch.distributed]
    pixels          which images are read, up to how many pixels, and what they look like
    augment         from pixels to the tensor that is sent to the device
    order           in which order samples are seen: a function of seed and epoch
    machines        accelerators by their data sheets
    networks        networks of the papers that timm does not have
    scale           the scale alpha of the cosine softmax: its rules
    signals         being told to stop: a scheduler's signal, or a launcher that is gone
    forks           child processes: forked until one lives, ended with their parent
    heartbeat       who is still there, and where: names the ranks that a failed run lost
    schedule        the learning rate by step
    regions         the parts of a person around the head, as they are cut out
    roc             the ROC curve from counts of pairs by score, and its figures
    captions        what the reader of a report is told of every picture and figure
    page            the page of a report: HTML and CSS in one file, for light and dark
    address         where a data set is: a folder, or a URL shown without its credentials
    errors          the one error that is the user's to mend
"""

__version__ = "0.1.0"

"""Text to batches.

A token store is made once (sources -> records -> tokenizer -> prepare) and then read by arithmetic (store, order, mix,
pack -> batches): the batch of step k is a function of (config, seed, k), so a loader has no state to save.

    sources.py     which files a corpus consists of; docstrings.py makes questions and answers of Python's own
    records.py     files -> raw records -> text or fields; bad records by kind and place
    examples.py    fields -> examples: a prompt and its answer, or a conversation
    tokenizer.py   one class over the libraries of tokenizer_backends.py; tokenizer_training.py makes a tokenizer
    chat.py        a conversation -> text, by the tokenizer's chat template
    answers.py     an example -> token ids, and which of them are an answer's
    encoding.py    raw records -> token ids and marks, in worker processes, in order
    options.py     what to prepare, and how
    staging.py     a folder that appears whole or not at all
    store.py       the folder of a token store: manifest, reading, verification
    writer.py      one split of a token store, written shard by shard
    prepare.py     corpus -> token store: all of the above
    order.py       a seeded permutation in O(1) memory
    mix.py         sample i of the run -> (store, sample of the store)
    pack.py        best-fit packing of whole documents
    sequences.py   a split cut into sequences: concatenated, packed, or one document each
    batches.py     the batch of a step, and the held-out batches

Nothing is imported here: the workers of prepare need no torch.
"""

"""The figures of iterative inference for a static model (Marino 2018, Figs 3–6), made from checkpoints and their logs.

    subject.py     what is reported on: a checkpoint, its log, validation rows
    race.py        ELBO against steps and time: the learned refiner beside conventional optimisers, learning rates searched
    strips.py      reconstructions after 0, 1, 2, … steps
    landscape.py   log p(x, z) of one digit over a two-dimensional z, and the paths of μ on it
    history.py     what log.jsonl says of the training: gradients and ELBO by epoch
    figures.py     measured data -> matplotlib Figure, one function a figure; style.py keeps them alike
    captions.py    what each figure measures, in words
    page.py        the HTML page · make.py  measures, draws and writes one figure after the other · cli.py  `elbow-train report`

Measuring and drawing never meet but in make.py: a figure can be drawn again from other numbers, and tested without a model.
"""

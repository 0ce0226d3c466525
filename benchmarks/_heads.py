"""Heads trained alike on features of any origin and on an equilibrium that learns with them."""

import numpy as np
import torch
from sklearn.base import clone

from skdeq._base import resolve_device
from skdeq._head import Head
from skdeq._head_training import HeadTrainer, TrainingRows
from skdeq.nn import EquilibriumLayer


def schedule(n, epochs, seed, step_size):
    """Yield the order of the rows and the step size, falling linearly, of each epoch."""
    generator = np.random.default_rng(seed)
    for epoch in range(epochs):
        yield generator.permutation(n), step_size * (1 - epoch / epochs)


def train_head(network, features, targets, n_outputs, epochs):
    """Yield the head of a DEQClassifier or DEQRegressor after each epoch on features as given."""
    generator = torch.Generator().manual_seed(network.random_state)
    head = Head.start(features, None, network.head_layer_sizes, n_outputs, generator)
    device = resolve_device(network.device)
    rows = TrainingRows(torch.from_numpy(features), targets, None, features, device)
    # The layer stays unused: the features stand where its latents would.
    layer = EquilibriumLayer(1, 1)
    network = clone(network).set_params(fine_tune=False, dropout=0.0)
    trainer = HeadTrainer(layer, head, network._head_options(), rows, network._loss(), generator)
    plan = schedule(len(features), epochs, network.random_state, network.learning_rate)
    for order, step_size in plan:
        for group in trainer.optimiser.param_groups:
            group["lr"] = step_size
        trainer.pass_once(order)
        yield trainer.head_arrays()


def train_network(network, X, y, epochs, **first):
    """Yield a DEQClassifier or DEQRegressor after each epoch; `first` is for the first of them."""
    plan = schedule(len(X), epochs, network.random_state, network.learning_rate)
    for order, step_size in plan:
        # Not fit with warm_start, which forgets Adam's moments between the calls.
        network.set_params(learning_rate=step_size).partial_fit(X[order], y[order], **first)
        first = {}
        yield network

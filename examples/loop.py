"""The loop over epochs: train, test, save."""

from collections.abc import Sequence

import saving
from config import RunOptions
from data import Dataset, evaluation_batches, training_batches
from progress import Progress
from training import Training, train_in_lockstep


def train(trainings: Sequence[Training], dataset: Dataset, options: RunOptions) -> None:
    """Bring the trainings to their end, or to ``options.stop_after``.

    They are saved every ``options.checkpoint_every`` steps, after the test of every epoch, and in
    the end.
    """
    config, total = trainings[0].config, trainings[0].total_steps
    last_step = min(total, options.stop_after or total)
    done = trainings[0].steps
    batches = training_batches(dataset.train, config, range(done, last_step), options.workers)
    curves = options.output / "tensorboard" if options.tensorboard else None
    with Progress(trainings, max(done, last_step), curves) as progress:
        while done < last_step:
            end_of_epoch = done - done % config.steps_per_epoch + config.steps_per_epoch
            done = min(last_step, end_of_epoch, done + options.checkpoint_every)
            train_in_lockstep(trainings, batches, done, progress.after_turn)
            tested = done == end_of_epoch
            if tested:
                for training in trainings:
                    training.test(evaluation_batches(dataset.test, config, options.workers))
                    progress.after_test(training)
            saving.save(trainings, options, tested=tested)

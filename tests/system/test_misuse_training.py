"""Nearly fifty misuses of training: what people do, and the one line they get.

`pytest -s tests/system/test_misuse_training.py` prints the table."""

import contextlib
import io
import math
from pathlib import Path

import pytest
import torch
from prepared import prepare
from small_trainers import Plain, market, plain_trainer, same, trading_env, trading_trainer, weights
from tensor_env import TensorEnv
from test_pipeline import edit

from trading_lib.checkpoint import load_checkpoint, save_checkpoint
from trading_lib.cli import main
from trading_lib.config import InputError
from trading_lib.pipeline.train import resume
from trading_lib.policy.factory import build_policy
from trading_lib.trainer import Diverged, NativePPOTrainer
from trading_lib.training.config import NativePPOConfig, get_a100_config, get_auto_config
from trading_lib.training.progress import LineProgress
from trading_lib.training.run_folder import RunFolder

# --- how things are done ------------------------------------------------------------------------------------


def train(*options):
    "What `trading-lib train` says: its exit status, and the line of the error or all that it printed."
    said, printed = io.StringIO(), io.StringIO()
    if not Path("data").exists():
        prepare("SIM-USD")
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        status = main(["train", *options])
    return status, said.getvalue().strip() or next(
        line for line in reversed(printed.getvalue().splitlines()) if line.startswith(("note", "resume"))
    )


def refused(call):
    "The line of an InputError."
    with pytest.raises(InputError) as e:
        call()
    return 2, f"error: {e.value}"


def trained(env=None, folder=None, goes_on=True, **settings):
    """A run that ends badly; the weights must be finite all the same, and those of the last good update
    where they are kept."""
    trainer = NativePPOTrainer(
        env or Kept(),
        NativePPOConfig(
            **{
                **dict(hidden_dims=(8,), n_steps=12, minibatch_size=96, n_epochs=2, total_timesteps=96 * 5),
                **settings,
            }
        ),
        progress=None,
        folder=folder and RunFolder(folder),
    )
    good, learn = [weights(trainer)], trainer._learn
    trainer._learn = lambda rollout: (learn(rollout), good.append(weights(trainer)))[0]
    with pytest.raises(Diverged) as e:
        trainer.train()
    assert (
        same(weights(trainer), good[-1])
        and all(torch.isfinite(v).all() for v in good[-1].values())
        and len(good) == trainer.update + 1
    )
    if trainer.update and folder:
        kept = load_checkpoint(folder / f"checkpoint_{trainer.update:06d}.pt")
        assert str(folder / f"checkpoint_{trainer.update:06d}.pt") in str(e.value) and same(
            dict(build_policy(kept).named_parameters()), good[-1]
        )
        again = NativePPOTrainer(
            Kept(), trainer.config, progress=None
        )  # where the cause is gone the run can go on
        again.restore(kept)
        assert not goes_on or len(again.train()) == again.updates == 5
    return 2, f"error: {e.value}"


class Kept(Plain):
    "An environment whose state can be saved."

    def state_dict(self):
        return {"random": self.random.get_state()}

    def load_state_dict(self, state):
        self.random = torch.Generator()
        self.random.set_state(state["random"])


class Wrong(Kept):
    "One that goes wrong at one step."

    steps = 0

    def __init__(self, at, wrong):
        self.at, self.wrong = at, wrong

    def step(self, actions):
        self.steps += 1
        out = list(super().step(actions))
        if self.steps == self.at:
            out = self.wrong(*out)
        return tuple(out)


def bad_reward(value):
    return lambda obs, reward, ended, cut, infos: (
        obs,
        reward.index_fill(0, torch.tensor([3]), value),
        ended,
        cut,
        infos,
    )


def bad_observation(obs, reward, ended, cut, infos):
    return obs.index_fill(1, torch.tensor([2]), math.nan), reward, ended, cut, infos


def bad_last_observation(obs, reward, ended, cut, infos):
    return obs, reward, ended, ~cut, {"final_obs": torch.full_like(obs, math.nan)}


class Odd(Plain):
    "An environment whose observations are not what the interface says."

    def __init__(self, change):
        self.change = change

    def reset(self, seed=0):
        return self.change(super().reset(seed))


def foreign(project, write, name="model.pt"):
    "A file that somebody else made."
    write(project / name)
    return refused(lambda: plain_trainer().load(project / name))


def model_of(project, **settings):
    return trading_trainer(**settings).save(project / "model.pt")


def loads(path, trainer):
    "A checkpoint that does not fit must leave no trace."
    before, state = weights(trainer), trainer.env.state_dict() if hasattr(trainer.env, "state_dict") else {}
    answer = refused(lambda: trainer.load(path))
    assert (
        same(weights(trainer), before)
        and trainer.update == trainer.global_step == 0
        and trainer.history == []
        and same(trainer.env.state_dict() if state else {}, state)
    )
    return answer


def cart_pole(n):
    return NativePPOTrainer(
        TensorEnv("CartPole-v1", n),
        NativePPOConfig(hidden_dims=(8,), n_steps=8, total_timesteps=8 * n * 4),
        progress=None,
    )


def other_accounts_of_cart_pole(project):
    first = cart_pole(4)
    first.train(1)
    return loads(first.save(project / "model.pt"), cart_pole(8))


def other_device(project):
    "As a GPU would have saved it: the state of its random numbers is 16 bytes."
    trainer = plain_trainer()
    trainer.train(1)
    content = trainer.content()
    content["processes"][0]["rng_state"] = torch.zeros(16, dtype=torch.uint8)
    return loads(save_checkpoint(content, project / "model.pt"), plain_trainer())


def resumed_from(project, write):
    "`--resume` is not stopped by a file that does not fit: it says so and starts anew."
    (project / "runs").mkdir()
    write(project / "runs" / "checkpoint_000003.pt")
    said, trainer = [], plain_trainer()
    trainer.folder, trainer.progress = RunFolder(project / "runs"), LineProgress(said.append)
    assert resume(trainer) is False and trainer.update == 0 and len(trainer.train()) == 4
    return 0, said[0]


def cut_file(path):
    plain_trainer().save(path)
    path.write_bytes(path.read_bytes()[:-1000])


# --- the table ----------------------------------------------------------------------------------------------

# what was done -> (how, exit status, words of the answer)
USES = {
    # numbers and names
    "a negative learning rate": (
        lambda p: train("SIM-USD", "--learning-rate", "-0.001"),
        2,
        "train.learning_rate: expected more than 0, was -0.001",
    ),
    "an infinite learning rate": (
        lambda p: refused(lambda: NativePPOConfig(learning_rate=math.inf)),
        2,
        "NativePPOConfig.learning_rate: expected a number, was inf",
    ),
    "no environments": (
        lambda p: train("SIM-USD", "--n-envs", "0"),
        2,
        "train.n_envs: expected more than 0, was 0",
    ),
    "no timesteps": (
        lambda p: train("SIM-USD", "--timesteps", "0"),
        2,
        "train.total_timesteps: expected more than 0, was 0",
    ),
    "no episodes": (
        lambda p: train("SIM-USD", "--episodes", "0"),
        2,
        "train.episodes: expected more than 0, was 0",
    ),
    "fewer than no iterations": (
        lambda p: train("SIM-USD", "--iterations", "-1"),
        2,
        "train.iterations: expected more than 0, was -1",
    ),
    "no patience": (
        lambda p: train("SIM-USD", "--patience", "0"),
        2,
        "train.patience: expected more than 0, was 0",
    ),
    "a layer of width 0": (
        lambda p: train("SIM-USD", "--hidden-dims", "256,0"),
        2,
        "train.hidden_dims: expected more than 0 for each, was [256, 0]",
    ),
    "layers in words": (
        lambda p: train("SIM-USD", "--hidden-dims", "big"),
        2,
        "hidden_dims: expected widths such as 512,256,128, was 'big'",
    ),
    "dropout of everything": (
        lambda p: refused(lambda: NativePPOConfig(network="gru", dropout=1.0)),
        2,
        "NativePPOConfig.dropout: expected 0 or more and less than 1, was 1.0",
    ),
    "a discount above 1": (
        lambda p: train("SIM-USD", "--gamma", "1.5"),
        2,
        "train.gamma: expected 0 to 1, was 1.5",
    ),
    "a negative seed": (
        lambda p: train("SIM-USD", "--seed", "-1"),
        2,
        "train.seed: expected 0 or more, was -1",
    ),
    "an unknown mode": (
        lambda p: train("SIM-USD", "--mode", "quick"),
        2,
        "train.mode: unknown name 'quick'; did you mean 'quick_test'?",
    ),
    "an unknown network": (
        lambda p: train("SIM-USD", "--network", "lstm"),
        2,
        "train.network: expected one of mlp, gru or null, was 'lstm'",
    ),
    "a misspelt setting": (
        lambda p: refused(lambda: get_auto_config(learning_rte=1e-3)),
        2,
        "NativePPOConfig: unknown name 'learning_rte'; did you mean 'learning_rate'?",
    ),
    "a precision that there is not": (
        lambda p: refused(lambda: NativePPOConfig(amp_dtype="fp8")),
        2,
        "NativePPOConfig.amp_dtype: expected one of bf16, fp16, was 'fp8'",
    ),
    "an A100 of 60 GB": (
        lambda p: refused(lambda: get_a100_config(60)),
        2,
        "get_a100_config: expected 40 or 80 GB, was 60",
    ),
    "an unknown device": (
        lambda p: train("SIM-USD", "--device", "gpu"),
        2,
        "train.device: expected auto, cpu, cuda or cuda:1, was 'gpu'",
    ),
    "a GPU where there is none": (
        lambda p: train("SIM-USD", "--device", "cuda"),
        2,
        "train.device: cuda was asked for, but torch sees no GPU here; use cpu or auto",
    ),
    # what contradicts itself
    "much memory and little": (
        lambda p: train("SIM-USD", "--high-vram", "--low-vram"),
        2,
        "high_vram and low_vram were both asked for; choose one",
    ),
    "loud and quiet": (
        lambda p: train("SIM-USD", "-v", "-q"),
        2,
        "--verbose and --quiet were both given; choose one",
    ),
    "one checkpoint for two symbols": (
        lambda p: (
            edit(p / "params.yaml", symbols=["SIM-USD", "SIMA"]),
            train("SIM-USD", "SIMA", "--checkpoint", "model.pt"),
        )[1],
        2,
        "--checkpoint: is of one symbol, asked to train SIM-USD, SIMA; name the one",
    ),
    "a minibatch larger than the rollout": (
        lambda p: train("SIM-USD", "--minibatch-size", "5000"),
        0,
        "note: minibatch_size: 5,000 is more than the 256 samples of a rollout (8 environments × 32 "
        "steps); all of them are one minibatch",
    ),
    "another number of accounts than configured": (
        lambda p: refused(lambda: plain_trainer(n_envs=4)),
        2,
        "NativePPOConfig.n_envs: the environment has 8, was 4",
    ),
    "a validation span that is too short": (
        lambda p: refused(lambda: trading_trainer(0, market().span(5500, 5501))),
        2,
        "no decision can be made in bars 5500..5500",
    ),
    # checkpoints
    "go on where nothing is": (
        lambda p: train("SIM-USD", "--resume"),
        2,
        "SIM-USD: there is nothing to resume in ",
    ),
    "go on from a file that is not there": (
        lambda p: train("SIM-USD", "--checkpoint", "nothing.pt"),
        2,
        "nothing.pt: no such file; train a model first or give the path of a checkpoint",
    ),
    "go on from a text file": (
        lambda p: foreign(p, lambda path: path.write_text("hello")),
        2,
        "model.pt: is not a checkpoint but something that starts with b'hello'",
    ),
    "go on from a file of torch": (
        lambda p: foreign(p, lambda path: torch.save({"weights": torch.zeros(3)}, path)),
        2,
        "model.pt: is a torch file without policy_state_dict; expected a checkpoint",
    ),
    "go on from a bare model": (
        lambda p: foreign(
            p,
            lambda path: save_checkpoint(
                {
                    name: v
                    for name, v in plain_trainer().content().items()
                    if name not in ("processes", "config")
                },
                path,
            ),
        ),
        2,
        "model.pt: holds no state to go on from",
    ),
    "--resume from a text file": (
        lambda p: resumed_from(p, lambda path: path.write_text("hello")),
        0,
        "skipped: ",
    ),
    "--resume from a cut file": (lambda p: resumed_from(p, cut_file), 0, "is truncated or corrupted"),
    "--resume from another network": (
        lambda p: resumed_from(p, plain_trainer(hidden_dims=(4,)).save),
        0,
        "holds a network of 6 inputs, mlp, hidden [4], 3 actions; asked for 6 inputs, mlp, hidden [16, "
        "8], 3 actions; starting fresh",
    ),
    "a checkpoint of another layout": (
        lambda p: loads(model_of(p), trading_trainer(version="2.7.0")),
        2,
        "holds a network of 5800 inputs, mlp, hidden [16], 8 actions; asked for 5900 inputs, mlp, "
        "hidden [16], 7 actions",
    ),
    "a checkpoint of another number of accounts": (
        lambda p: (
            lambda t: (t.train(1), loads(t.save(p / "model.pt"), trading_trainer(env=trading_env(n_envs=4))))[
                1
            ]
        )(trading_trainer(n_epochs=1)),
        2,
        "n_envs is 4 here, the state is of 8 accounts",
    ),
    "a checkpoint of fewer games": (
        other_accounts_of_cart_pole,
        2,
        "n_envs is 8 here, the state is of 4 environments",
    ),
    "a recurrent checkpoint of another width": (
        lambda p: loads(
            plain_trainer(network="gru", gru_hidden_dim=8).save(p / "model.pt"),
            plain_trainer(network="gru", gru_hidden_dim=4),
        ),
        2,
        "asked for 6 inputs, gru, hidden 4, 2 layers, 3 actions",
    ),
    "a checkpoint of a GPU": (other_device, 2, "was trained on another kind of device"),
    # what is met on the way
    "NaN in a reward": (
        lambda p: trained(Wrong(30, bad_reward(math.nan)), p / "run"),
        2,
        "in update 3 the rewards became nan, first of account 3 at step 5 of the rollout; check the "
        "environment's data and rewards. The weights are those of update 2",
    ),
    "an infinite reward": (
        lambda p: trained(Wrong(1, bad_reward(math.inf)), p / "run"),
        2,
        "in update 1 the rewards became inf, first of account 3 at step 0",
    ),
    "NaN in an observation": (
        lambda p: trained(Wrong(30, bad_observation), p / "run"),
        2,
        "in update 3 the observations became nan, first of account 0 at step 6 of the rollout",
    ),
    "NaN in the last observation of a rollout": (
        lambda p: trained(Wrong(24, bad_observation), p / "run"),
        2,
        "in update 2 the value of a last observation became nan, first of account 0 at step 11 of the "
        "rollout; check the environment's data",
    ),
    "NaN in the last observation of an episode": (
        lambda p: trained(Wrong(30, bad_last_observation), p / "run"),
        2,
        "in update 3 the value of a last observation became nan, first of account 0 at step 5 of the rollout",
    ),
    "an absurd learning rate": (
        lambda p: trained(None, p / "run", learning_rate=1e20),
        2,
        "became NaN or infinite though the rollout was finite; use a smaller learning_rate (was 1e+20)",
    ),
    "an absurd learning rate after a while": (
        lambda p: trained(
            None, p / "run", goes_on=False, learning_rate=1e9, n_epochs=1, total_timesteps=96 * 5
        ),
        2,
        "The weights are those of update",
    ),
    "numbers of NumPy": (
        lambda p: refused(lambda: NativePPOTrainer(Odd(lambda obs: obs.numpy()), progress=None).train()),
        2,
        "reset: expected float32 observations of shape (8, 6) as a tensor, was ndarray",
    ),
    "numbers of twice the precision": (
        lambda p: refused(lambda: NativePPOTrainer(Odd(lambda obs: obs.double()), progress=None).train()),
        2,
        "reset: expected float32 observations of shape (8, 6) as a tensor, was float64 of shape (8, 6)",
    ),
    "fewer accounts than said": (
        lambda p: refused(lambda: NativePPOTrainer(Odd(lambda obs: obs[:4]), progress=None).train()),
        2,
        "was float32 of shape (4, 6)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_a_misuse_gets_one_line(project, use):
    act, expected_status, words = USES[use]
    if use == "a GPU where there is none" and torch.cuda.is_available():
        pytest.skip("there is one here")
    status, line = act(project)
    print(f"\n{use:50} {status}  {line}", end="")
    assert status == expected_status and words in line and "\n" not in line and "Traceback" not in line

"""Any Gymnasium environment as the trainer knows environments, so that its PPO can be checked on tasks
that everyone knows.

`trading_lib.gymnasium_env` shows our trading to other libraries; this is the way back. A trainer that
only ever saw its own environment may be wrong in ways that its own environment hides, so
`reference_tasks.py` trains it on CartPole, Acrobot and a memory task as well, beside stable-baselines3:

    env = TensorEnv("CartPole-v1", 8)
    trainer = NativePPOTrainer(env, NativePPOConfig(hidden_dims=(64, 64), total_timesteps=100_000))

Observations are flattened to float32, actions are counted from 0, and an environment whose episode ended
has begun another one when `step` returns: `final_obs` is what it saw last. Returns and lengths of
finished episodes are collected, each with the step of the whole run at which it ended.

An exact resume needs the state of every single environment. Gymnasium has no common way to ask for it. It
is known here for Gymnasium's classic control tasks, and for environments that have `state_dict` and
`load_state_dict` of their own. For all others `TensorEnv` has neither: a resumed run begins new episodes,
and is not the run that was never interrupted.
"""

from functools import partial

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

from trading_lib.config import InputError

# --- the state of one environment ---------------------------------------------------------------------------

# these keep no state of their own that a step depends on, but for the steps of a TimeLimit
_TRANSPARENT = (gym.wrappers.TimeLimit, gym.wrappers.OrderEnforcing, gym.wrappers.PassiveEnvChecker)


def _time_limit(env: gym.Env) -> gym.Env | None:
    "The wrapper that counts steps, if there is one."
    while isinstance(env, gym.Wrapper):
        if isinstance(env, gym.wrappers.TimeLimit):
            return env
        env = env.env
    return None


def _state_is_known(env: gym.Env) -> bool:
    "Whether everything that the next step depends on can be read and put back."
    while isinstance(env, gym.Wrapper):
        if not isinstance(env, _TRANSPARENT):
            return False
        env = env.env
    classic = type(env).__module__.startswith("gymnasium.envs.classic_control.")
    return classic or hasattr(env, "load_state_dict")


def _state_of(env: gym.Env) -> dict:
    "Plain numbers and tensors of one environment."
    inner, limit = env.unwrapped, _time_limit(env)
    if hasattr(inner, "load_state_dict"):
        state = inner.state_dict()
    else:
        state = {
            "state": torch.tensor(np.asarray(inner.state, dtype=np.float64)),
            "random": inner.np_random.bit_generator.state,
        }
    return {"env": state, "elapsed": limit._elapsed_steps if limit else None}


def _restore(env: gym.Env, state: dict):
    "The inverse of `_state_of`."
    env.reset()  # wrappers want to have seen one
    inner, limit = env.unwrapped, _time_limit(env)
    if hasattr(inner, "load_state_dict"):
        inner.load_state_dict(state["env"])
    else:
        inner.state = state["env"]["state"].numpy().copy()
        inner.np_random.bit_generator.state = state["env"]["random"]
    if limit:
        limit._elapsed_steps = state["elapsed"]


# --- the adapter --------------------------------------------------------------------------------------------


def _side_by_side(env, n_envs: int | None) -> VectorEnv:
    "Environments that are reset in the same step, from all that may be given."
    if isinstance(env, VectorEnv):
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise InputError(
                f"TensorEnv: expected environments with autoreset_mode=AutoresetMode.SAME_STEP, was {mode}"
            )
        if n_envs not in (None, env.num_envs):
            raise InputError(
                f"TensorEnv: this VectorEnv has {env.num_envs} environments, n_envs was {n_envs}; "
                "leave it out"
            )
        return env
    if not isinstance(env, str) and not callable(env):
        raise InputError(
            f"TensorEnv: expected an id, a function that makes one environment, or a VectorEnv, was {env!r}"
        )
    if not isinstance(n_envs, (int, np.integer)) or n_envs < 1:
        raise InputError(f"TensorEnv: n_envs: expected a whole number from 1, was {n_envs!r}")
    make = partial(gym.make, env) if isinstance(env, str) else env
    try:
        return SyncVectorEnv([make] * int(n_envs), autoreset_mode=AutoresetMode.SAME_STEP)
    except gym.error.Error as e:
        raise InputError(f"TensorEnv: {' '.join(str(e).split())}") from None


class TensorEnv:
    "Gymnasium environments with flat observations and numbered actions, stepped together on tensors."

    def __init__(
        self,
        # a VectorEnv that resets in the same step; or an id such as "CartPole-v1", or a function without
        # arguments that makes one environment
        env,
        n_envs: int | None = None,  # how many of that id or function; a VectorEnv has its own number
        device: str | torch.device = "cpu",  # where tensors live; the environments themselves run on the CPU
    ):
        env = _side_by_side(env, n_envs)
        observations, actions = env.single_observation_space, env.single_action_space
        if not isinstance(observations, gym.spaces.Box):
            raise InputError(
                f"TensorEnv: expected observations of a Box, was {observations}; "
                "flatten them with gymnasium.wrappers.FlattenObservation"
            )
        if not isinstance(actions, gym.spaces.Discrete):
            raise InputError(f"TensorEnv: expected Discrete actions, was {actions}")
        self.env, self.device = env, torch.device(device)
        self.n_envs, self.n_actions = env.num_envs, int(actions.n)
        self.obs_dim = int(np.prod(observations.shape))
        self._first_action = int(actions.start)
        self.finished = []  # (step of the run, return, length) of each finished episode
        if type(env) is SyncVectorEnv and all(map(_state_is_known, env.envs)):
            self.state_dict, self.load_state_dict = self._state_dict, self._load_state_dict

    def _observations(self, values: np.ndarray) -> Tensor:  # (n, obs_dim) float32
        flat = np.asarray(values, dtype=np.float32).reshape(len(values), self.obs_dim)
        return torch.tensor(flat, device=self.device)

    def reset(
        self,
        seed: int | None = None,  # of the first environment; the others have the numbers that follow it
    ) -> Tensor:  # (n_envs, obs_dim) float32
        "Begin all episodes, and the count of steps."
        self.finished, self.global_step = [], 0
        self._returns, self._lengths = np.zeros(self.n_envs), np.zeros(self.n_envs, dtype=np.int64)
        self._obs = self._observations(self.env.reset(seed=seed)[0])
        return self._obs

    def _numbered(self, actions: Tensor) -> np.ndarray:  # (n_envs,)
        "Actions that exist, as numpy has them."
        actions = torch.as_tensor(actions).cpu().numpy()
        whole = actions.shape == (self.n_envs,) and actions.dtype.kind in "iu"
        if not whole or actions.min() < 0 or actions.max() >= self.n_actions:
            given = actions.tolist() if actions.size < 9 else f"{actions.dtype} of shape {actions.shape}"
            raise InputError(
                f"step: expected {self.n_envs} whole numbers from 0 to {self.n_actions - 1}, was {given}"
            )
        return actions

    def step(
        self,
        actions: Tensor,  # (n_envs,) from 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        # observations, rewards float32, terminated, truncated, infos with `final_obs` (n_envs, obs_dim)
        "One step of every environment."
        if not hasattr(self, "_obs"):
            raise InputError("step: no episode has begun; call reset(seed) first")
        actions = self._numbered(actions)
        obs, rewards, terminated, truncated, infos = self.env.step(actions + self._first_action)
        self._obs = final = self._observations(obs)
        self.global_step += self.n_envs
        self._returns += rewards
        self._lengths += 1
        ended = np.flatnonzero(terminated | truncated)
        if len(ended):
            final = self._obs.clone()
            final[ended] = self._observations(np.stack(infos["final_obs"][ended].tolist()))
            for i in ended:
                self.finished.append((self.global_step, float(self._returns[i]), int(self._lengths[i])))
            self._returns[ended], self._lengths[ended] = 0, 0
        return (
            self._obs,
            torch.tensor(rewards, dtype=torch.float32, device=self.device),
            torch.tensor(terminated, dtype=torch.bool, device=self.device),
            torch.tensor(truncated, dtype=torch.bool, device=self.device),
            {"final_obs": final},
        )

    def _state_dict(self) -> dict:
        "Everything that the next step depends on, as tensors and numbers."
        if not hasattr(self, "_obs"):
            return {}
        return {
            "envs": [_state_of(env) for env in self.env.envs],
            "obs": self._obs.clone(),
            "global_step": self.global_step,
            "finished": list(self.finished),
            "returns": torch.tensor(self._returns),
            "lengths": torch.tensor(self._lengths),
        }

    def _load_state_dict(self, state: dict) -> Tensor:  # the observations that `state_dict` was taken at
        "Go on exactly where `state_dict` was taken."
        n = len(state.get("envs", ()))
        if n != self.n_envs:
            given = f"of {n} environments" if n else "empty"
            raise InputError(f"environment state: n_envs is {self.n_envs} here, the state is {given}")
        for env, own in zip(self.env.envs, state["envs"]):
            _restore(env, own)
        self._obs, self.global_step = state["obs"].clone().to(self.device), state["global_step"]
        self.finished = [tuple(row) for row in state["finished"]]
        self._returns = state["returns"].cpu().numpy().copy()
        self._lengths = state["lengths"].cpu().numpy().copy()
        return self._obs


# --- a task that only memory solves -------------------------------------------------------------------------


class CueRecall(gym.Env):
    """The first observation shows a cue; several noisy steps later the action must name it: reward 1.

    What is seen when the flag asks says nothing of the cue: without memory, a policy can only guess.
    """

    metadata = {"render_modes": []}

    def __init__(
        self,
        n_cues: int = 4,  # cues, and actions
        delay: tuple[int, int] = (4, 8),  # fewest and most steps between the cue and the question
    ):
        if not isinstance(n_cues, (int, np.integer)) or n_cues < 2:
            raise InputError(f"CueRecall: n_cues: expected a whole number from 2, was {n_cues!r}")
        if len(delay) != 2 or not 0 <= delay[0] <= delay[1]:
            raise InputError(
                f"CueRecall: delay: expected fewest and most steps such as (4, 8), was {delay!r}"
            )
        self.n_cues, self.delay = int(n_cues), (int(delay[0]), int(delay[1]))
        # the cue as one of n, the question's flag, noise
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (self.n_cues + 2,), dtype=np.float32)
        self.action_space = gym.spaces.Discrete(self.n_cues)

    def _observe(self) -> np.ndarray:  # (n_cues + 2,) float32
        obs = np.zeros(self.n_cues + 2, dtype=np.float32)
        if self._left > self._wait:
            obs[self._cue] = 1
        obs[-2], obs[-1] = self._left == 0, self.np_random.uniform(-1, 1)
        return obs

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        "Draw a cue and a delay; `options` may hold the `cue`. Returns observation and info."
        super().reset(seed=seed)
        drawn = self.np_random.integers(self.n_cues)  # drawn even where it is given: all else stays the same
        self._cue = int((options or {}).get("cue", drawn))
        fewest, most = self.delay
        self._wait = int(self.np_random.integers(fewest, most + 1))
        self._left = self._wait + 1  # steps until the question
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        "Only the action at the question counts; it ends the episode."
        asked = self._left == 0
        self._left -= 1
        return self._observe(), float(asked and action == self._cue), asked, False, {}

    def state_dict(self) -> dict:
        "For an exact resume."
        return {
            "cue": self._cue,
            "wait": self._wait,
            "left": self._left,
            "random": self.np_random.bit_generator.state,
        }

    def load_state_dict(self, state: dict):
        "Go on exactly where `state_dict` was taken."
        self._cue, self._wait, self._left = state["cue"], state["wait"], state["left"]
        self.np_random.bit_generator.state = state["random"]

"""Other trainers' PPO on our environment, for `training.py`: each function makes a trainer and returns what
runs one of its iterations, rollout and update.

All have two networks, one for the policy and one for the value, with ReLU; the same batches, epochs,
discount, lambda, clipping, entropy, gradient norm and Adam. All read the same dense observations of the same
batch of accounts, so that trainers are compared and not environments.
"""

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.nn.functional import log_softmax

from trading_lib.training.ppo import generalized_advantages, minibatches, normalize


class DenseEnv:
    "Our environment as one without a table: whole windows, as any library wants them."

    def __init__(self, env):
        self.env, self.n_envs, self.n_actions, self.obs_dim, self.device = (
            env,
            env.n_envs,
            env.n_actions,
            env.obs_dim,
            env.device,
        )

    def reset(self, seed: int | None = None):
        return self.env.reset(seed)

    def step(self, actions):
        obs, reward, terminated, truncated, infos = self.env.step(actions)
        return obs, reward, terminated, truncated, {"final_obs": infos["final_obs"]}


# --- a loop in one file, as CleanRL has them ---


class TwoNetworks(nn.Module):
    """Policy and value, each with hidden layers of its own.

    Parameters in the order and by the names of `NativeActorCritic` with two trunks.
    """

    def __init__(self, obs_dim: int, n_actions: int, hidden_dims):
        super().__init__()

        def linear(inputs, outputs, gain):
            layer = nn.Linear(inputs, outputs)
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
            return layer

        widths = [obs_dim, *hidden_dims]

        def trunk():
            return nn.Sequential(
                *(m for a, b in zip(widths, widths[1:]) for m in (linear(a, b, 2**0.5), nn.ReLU()))
            )

        self.actor_trunk, self.critic_trunk = trunk(), trunk()
        self.actor_head, self.critic_head = linear(widths[-1], n_actions, 0.01), linear(widths[-1], 1, 1.0)

    def value(self, obs):
        return self.critic_head(self.critic_trunk(obs)).squeeze(-1)

    def forward(self, obs):
        return self.actor_head(self.actor_trunk(obs)), self.value(obs)


class SingleFilePPO:
    "Stored observations, shuffled minibatches, autograd, Adam."

    def __init__(self, env, settings: dict, device: torch.device, seed: int = 0):
        self.env, self.settings, self.device = env, settings, device
        torch.manual_seed(seed)
        self.network = TwoNetworks(env.obs_dim, env.n_actions, settings["hidden_dims"]).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings["learning_rate"], eps=1e-5)
        self.random = torch.Generator(device)
        self.random.manual_seed(seed)
        self.obs = env.reset(seed)
        shape = settings["n_steps"], env.n_envs
        self.stored = {
            "obs": torch.zeros(*shape, env.obs_dim, device=device),
            "action": torch.zeros(shape, dtype=torch.int64, device=device),
            **{
                name: torch.zeros(shape, device=device)
                for name in ("log_probability", "value", "reward", "next_value")
            },
            **{name: torch.zeros(shape, dtype=torch.bool, device=device) for name in ("terminated", "done")},
        }

    @torch.no_grad()
    def rollout(self) -> dict:
        "Let the policy act."
        stored, steps = self.stored, self.settings["n_steps"]
        for t in range(steps):
            logits, value = self.network(self.obs)
            log_probabilities = log_softmax(logits, 1)
            action = torch.multinomial(log_probabilities.exp(), 1, generator=self.random)
            after, reward, terminated, truncated, infos = self.env.step(action.squeeze(1))
            for name, x in (
                ("obs", self.obs),
                ("action", action.squeeze(1)),
                ("log_probability", log_probabilities.gather(1, action).squeeze(1)),
                ("value", value),
                ("reward", reward),
                ("terminated", terminated),
                ("done", terminated | truncated),
            ):
                stored[name][t] = x
            if truncated.any():
                stored["next_value"][t, truncated] = self.network.value(infos["final_obs"][truncated])
            if t:
                stored["next_value"][t - 1] = torch.where(
                    stored["done"][t - 1], stored["next_value"][t - 1], value
                )
            self.obs = after
        stored["next_value"][-1] = torch.where(
            stored["done"][-1], stored["next_value"][-1], self.network.value(self.obs)
        )
        return stored

    def learn(self, stored: dict, n_epochs: int):
        "All epochs over one rollout."
        s = self.settings
        advantages = generalized_advantages(
            stored["reward"],
            stored["value"],
            stored["next_value"],
            stored["terminated"],
            stored["done"],
            s["gamma"],
            s["gae_lambda"],
        )
        data = {
            name: x.flatten(0, 1)
            for name, x in (
                stored | {"advantage": advantages, "return": advantages + stored["value"]}
            ).items()
        }
        for _ in range(n_epochs):
            for batch in minibatches(len(data["action"]), s["minibatch_size"], self.random):
                logits, value = self.network(data["obs"][batch])
                log_probabilities, advantage = log_softmax(logits, 1), normalize(data["advantage"][batch])
                ratio = (
                    log_probabilities.gather(1, data["action"][batch][:, None]).squeeze(1)
                    - data["log_probability"][batch]
                ).exp()
                policy_loss = torch.max(
                    -advantage * ratio, -advantage * ratio.clamp(1 - s["clip_range"], 1 + s["clip_range"])
                ).mean()
                entropy = -(log_probabilities.exp() * log_probabilities).sum(1).mean()
                loss = (
                    policy_loss
                    - s["entropy_coefficient"] * entropy
                    + s["value_coefficient"] * ((value - data["return"][batch]) ** 2).mean()
                )
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.network.parameters(), s["max_grad_norm"])
                self.optimizer.step()


def single_file(env, settings: dict, device: torch.device):
    "The CleanRL-style loop."
    ppo = SingleFilePPO(DenseEnv(env), settings, device)
    return lambda n_epochs: ppo.learn(ppo.rollout(), n_epochs)


# --- stable-baselines3 and sbx ---


def _vec_env(env):
    "Our batch of accounts as stable-baselines3 knows environments."
    from stable_baselines3.common.vec_env import VecEnv

    class Accounts(VecEnv):
        def __init__(self):
            super().__init__(
                env.n_envs,
                gym.spaces.Box(-np.inf, np.inf, (env.obs_dim,), np.float32),
                gym.spaces.Discrete(env.n_actions),
            )

        def reset(self):
            return env.reset(0).cpu().numpy()

        def step_async(self, actions):
            self.actions = torch.as_tensor(np.asarray(actions)).long()

        def step_wait(self):
            obs, reward, terminated, truncated, infos = env.step(self.actions.to(env.device))
            done, rows = (terminated | truncated).cpu().numpy(), [{} for _ in range(self.num_envs)]
            for i in np.flatnonzero(done):
                rows[i] = {
                    "terminal_observation": infos["final_obs"][i].cpu().numpy(),
                    "TimeLimit.truncated": bool(truncated[i]),
                }
            return obs.cpu().numpy(), reward.cpu().numpy(), done, rows

        def close(self):
            pass

        def get_attr(self, attr_name, indices=None):
            return [None] * self.num_envs

        def set_attr(self, attr_name, value, indices=None):
            pass

        def env_method(self, method_name, *method_args, indices=None, **method_kwargs):
            return [None] * self.num_envs

        def env_is_wrapped(self, wrapper_class, indices=None):
            return [False] * self.num_envs

    return Accounts()


def _baselines(algorithm, env, s: dict, device, **policy):
    "What both libraries have in common."
    model = algorithm(
        "MlpPolicy",
        _vec_env(env),
        learning_rate=s["learning_rate"],
        n_steps=s["n_steps"],
        batch_size=s["minibatch_size"],
        n_epochs=s["n_epochs"],
        gamma=s["gamma"],
        gae_lambda=s["gae_lambda"],
        clip_range=s["clip_range"],
        ent_coef=s["entropy_coefficient"],
        vf_coef=s["value_coefficient"],
        max_grad_norm=s["max_grad_norm"],
        policy_kwargs=dict(
            net_arch=dict(pi=list(s["hidden_dims"]), vf=list(s["hidden_dims"])), ortho_init=True, **policy
        ),
        device=device,
        seed=0,
    )

    def iterate(n_epochs):
        model.n_epochs = n_epochs
        model.learn(s["n_steps"] * env.n_envs, reset_num_timesteps=False)

    return iterate


def stable_baselines3(env, settings: dict, device: torch.device):
    from stable_baselines3 import PPO

    return _baselines(PPO, env, settings, device, activation_fn=nn.ReLU)


def sbx(env, settings: dict, device: torch.device):  # on the device that JAX chooses
    import flax.linen
    from sbx import PPO

    return _baselines(PPO, env, settings, "auto", activation_fn=flax.linen.relu)


# --- TorchRL ---


def torchrl(env, settings: dict, device: torch.device):
    """Collector, advantage module, buffer without replacement and clipped loss, as in the library's own PPO
    example."""
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torch.distributions import Categorical as Distribution
    from torchrl import collectors
    from torchrl.data import Categorical, Composite, LazyTensorStorage, TensorDictReplayBuffer, Unbounded
    from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
    from torchrl.envs import EnvBase
    from torchrl.modules import ProbabilisticActor, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    s, n = settings, env.n_envs

    class Accounts(EnvBase):
        def __init__(self):
            super().__init__(device=device, batch_size=[n])
            self.observation_spec = Composite(
                observation=Unbounded((n, env.obs_dim), device=device), shape=[n], device=device
            )
            self.action_spec = Categorical(env.n_actions, shape=(n,), device=device)
            self.reward_spec = Unbounded((n, 1), device=device)

        def _reset(self, tensordict=None, **_):
            if tensordict is None or "_reset" not in tensordict.keys():
                self.now = env.reset(0)  # else accounts that ended have begun anew in the step before
            return TensorDict({"observation": self.now}, [n], device=device)

        def _step(self, tensordict):
            self.now, reward, terminated, truncated, infos = env.step(tensordict["action"])
            ended = {
                name: x[:, None]
                for name, x in (
                    ("reward", reward),
                    ("terminated", terminated),
                    ("truncated", truncated),
                    ("done", terminated | truncated),
                )
            }
            return TensorDict({"observation": infos["final_obs"], **ended}, [n], device=device)

        def _set_seed(self, seed):
            pass

    networks = TwoNetworks(env.obs_dim, env.n_actions, s["hidden_dims"]).to(device)
    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(networks.actor_trunk, networks.actor_head), ["observation"], ["logits"]
        ),
        in_keys=["logits"],
        distribution_class=Distribution,
        return_log_prob=True,
    )
    critic = ValueOperator(
        nn.Sequential(networks.critic_trunk, networks.critic_head), in_keys=["observation"]
    )
    frames = s["n_steps"] * n
    collector = iter(
        collectors.Collector(Accounts(), actor, frames_per_batch=frames, total_frames=-1, device=device)
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(frames, device=device),
        sampler=SamplerWithoutReplacement(),
        batch_size=s["minibatch_size"],
    )
    advantage = GAE(gamma=s["gamma"], lmbda=s["gae_lambda"], value_network=critic, average_gae=False)
    loss_of = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=s["clip_range"],
        entropy_coeff=s["entropy_coefficient"],
        critic_coeff=s["value_coefficient"],
        loss_critic_type="l2",
        normalize_advantage=True,
    )
    optimizer = torch.optim.Adam(loss_of.parameters(), lr=s["learning_rate"], eps=1e-5)

    def iterate(n_epochs):
        data = next(collector)
        with torch.no_grad():
            data = advantage(data)
        buffer.extend(data.reshape(-1))
        for _ in range(n_epochs):
            for batch in buffer:
                losses = loss_of(batch.to(device))
                loss = losses["loss_objective"] + losses["loss_entropy"] + losses["loss_critic"]
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(loss_of.parameters(), s["max_grad_norm"])
                optimizer.step()

    return iterate


PEERS = {"stable-baselines3": stable_baselines3, "CleanRL-style": single_file, "sbx": sbx, "TorchRL": torchrl}

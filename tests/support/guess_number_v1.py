"""A ``verifiers`` environment for the tests: guess a number with the hints higher and lower."""

import verifiers.v1 as vf

__all__ = ["GuessEnv", "GuessTaskset"]


class GuessData(vf.TaskData):
    number: int


class GuessTask(vf.Task[GuessData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def guessed(self, trace: vf.Trace) -> float:
        return float(str(self.data.number) in (trace.branches[-1].messages[-1].content or ""))


class GuessTaskset(vf.Taskset[GuessTask, vf.TasksetConfig]):
    def load(self):
        for number in (3, 5, 7):
            yield GuessTask(
                GuessData(prompt=f"Guess a number up to 9 (not {number}0).", number=number),
                self.config.task,
            )


class GuessConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()
    helper: vf.AgentConfig = vf.AgentConfig()
    helped: bool = False


class GuessEnv(vf.Env[GuessConfig]):
    async def setup(self, agents):
        agents.helper.trainable = False

    async def run(self, task, agents):
        print("environments print to standard output")
        if self.config.helped:
            hint = vf.Task(vf.TaskData(idx=0, prompt="Give a hint."))
            async with agents.helper.interaction(hint) as helper:
                await helper.turn()
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn()
            while not segment.terminated and str(task.data.number) not in segment.last_reply:
                guess = int("".join(filter(str.isdigit, segment.last_reply)) or 0)
                segment = await interaction.turn("higher" if guess < task.data.number else "lower")

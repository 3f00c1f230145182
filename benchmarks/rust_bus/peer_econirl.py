"""econirl's nested fixed point. Run by its own interpreter: ``peer_econirl.py QUESTION ANSWER``."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas
from econirl.datasets import rust_bus_reward_spec
from econirl.estimators import NFXP


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    frame = pandas.DataFrame({name: asked[name] for name in ("bus", "state", "action")})
    model = NFXP(
        n_states=asked["bins"],
        discount=asked["discount"],
        utility=rust_bus_reward_spec(asked["bins"]),
        se_method="asymptotic",
    )
    started = time.perf_counter()
    model.fit(
        frame,
        state="state",
        action="action",
        id="bus",
        transitions=np.array(asked["transitions"]),
    )
    answer = {
        "replacement_cost": float(model.params_["replacement_cost"]),
        "cost_slope": 1000 * float(model.params_["operating_cost"]),
        "log_likelihood": float(model.log_likelihood_),
        "converged": bool(model.converged_),
        "seconds": round(time.perf_counter() - started, 2),
    }
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()

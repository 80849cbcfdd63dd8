"""Labelling jobs with many answers in them, made in one go."""

import json
import random
import time

from recipes.labelling import accounts
from recipes.labelling.store import Store
from recipes.labelling.tasks import read_tasks
from tests.labelling.labelling_server import write_samples


def write_job(path, prompts, labelers=3, overlap=2, share=1.0, drafts=2, responses=4):
    """A job in which `overlap` of the labelers have ranked the first `share` of the prompts, after some drafts each.

    Returns its store and the labelers' ids.
    """
    job = Store(path, create=True, overlap=overlap, gold_every=0, guidelines="Rank.")
    tasks, _ = read_tasks(write_samples(path.with_suffix(".samples.jsonl"), prompts, responses))
    job.add_tasks(tasks, "samples.jsonl")
    for number in range(labelers):
        accounts.add_labeler(job, f"labeler {number}")
    ids = [labeler.id for labeler in accounts.labelers(job)]
    chance, now = random.Random(0), time.time() - 1e6
    with job.transaction(write=True) as db:
        for number, task in enumerate(tasks[: round(share * prompts)]):
            order = [response.id for response in task.responses]
            for turn in range(overlap):
                me = ids[(number + turn) % labelers]
                chance.shuffle(order)
                db.execute("INSERT INTO assignment VALUES (?, ?, ?, ?)", (task.id, me, json.dumps(order), now))
                tiers = json.dumps([[id] for id in sorted(order, key=lambda id: (chance.random() < 0.2, id))])
                for kind in ["draft"] * drafts + ["submit"]:
                    now += 1
                    event = db.execute(
                        "INSERT INTO event (prompt_id, labeler_id, kind, tiers, comment, active_seconds, key, digest,"
                        " server_time) VALUES (?, ?, ?, ?, '', ?, ?, '', ?)",
                        (task.id, me, kind, tiers, chance.expovariate(1 / 30), f"{chance.random()}", now),
                    ).lastrowid
                    rows = [(event, id, "It says what was asked for.", None, "[]") for id in order]
                    db.executemany("INSERT INTO review VALUES (?, ?, ?, ?, ?)", rows)
    return job, ids

"""A run behind HTTP: RUN=shop-run uvicorn serve_api:app --app-dir docs/examples (needs the extra `serve`)."""

import os
import threading
from pathlib import Path

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

import recbole_cl
from recbole_cl.errors import ConfigError
from recbole_cl.serve import Recommender

FOLDER = Path(os.environ["RUN"])
app, lock, state = FastAPI(title="recommendations"), threading.Lock(), {}


class Question(BaseModel):
    users: list[str] | None = None
    histories: list[list[str]] | None = None
    k: int = 10
    excluded: list[str] = []


def run() -> Recommender:
    """Returns the champion; loads it again when an update, a rollback or a retirement has replaced the list."""
    index = FOLDER / "versions" / "index.json"
    stamp = index.stat().st_mtime_ns if index.is_file() else 0
    if state.get("stamp") != stamp:
        state.update(run=recbole_cl.load(FOLDER), stamp=stamp)
    return state["run"]


@app.post("/recommend")
def recommend(question: Question) -> list[dict]:
    try:
        with lock:  # one question at a time: a model is no place for two
            answers = run().recommend(
                question.users, question.k, histories=question.histories, excluded=question.excluded
            )
    except ConfigError as error:
        raise HTTPException(422, str(error)) from error
    return [vars(answer) for answer in answers]


@app.get("/similar/{item}")
def similar(item: str, k: int = 10) -> dict:
    with lock:
        return vars(run().similar_items(item, k))


@app.get("/health")
def health() -> dict:
    with lock:
        return vars(run().position)

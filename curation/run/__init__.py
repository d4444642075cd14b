"""Makes sure that each shard is processed exactly once, by any number of processes on any number of nodes.

A **stage** is work on one shard; the **runner** has the only loop over shards.  A **claim** says who works on a
shard, which avoids double work; an **attempt** is one try of one process; the **commit** lets exactly one attempt
publish its outputs. A **receipt** records what was done to a shard, and the **ledger** is all receipts of a stage
under one **options version**.  A **checkpoint** keeps what an attempt has finished before it ends.
"""

from curation.options import RunOptions
from curation.run.follow import Follows
from curation.run.inputs import Input
from curation.run.runner import run_stage, stage_main
from curation.run.work import Later, ShardContext, Stage

__all__ = ["Follows", "Input", "Later", "RunOptions", "ShardContext", "Stage", "run_stage", "stage_main"]

"""Groups of replicas, the journal, members.

* `quorum`, `leader_machine`, `follower_machine`, `roster_machine`  the rules, without I/O
* `group`, `contact`      what drives the machines, for the journal and for tablets alike
* `journal`, `metadata`   the replicated log of commands and the state that it makes
* `one_node`              the plain backend: the first member leads
"""

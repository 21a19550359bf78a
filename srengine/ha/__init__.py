"""High availability: who leads, who belongs, what all agree on; and the replication of tablets by their leader.

* `protocol`, `backends`                        what a node asks of coordination, and who provides it
* `journal`, `metadata`, `outcomes`, `state`    the replicated log of commands and the state that it makes
* `epochs`, `members`, `registers`              parts of that state, each an applier
* `role_machine`, `roles`, `fencing`            what this node is, and how it becomes the one that acts
* `claims_machine`, `roster_machine`, `contact`  processes of nodes: restored, cloned, doubled ones are found
* `quorum`, `leader_machine`, `follower_machine`, `group`  replicas of a tablet, led by the first member
"""

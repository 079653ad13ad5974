"""Populations of clients: one server, many clients of unlike speed and data.

    Asynchronous      model, clients, loss, schedule, weights -> trained model and trace          asynchronous.py
      .simulate       on a virtual clock, no sleeping                                             virtual_clock.py
      serve, join, spawn   real processes, the wall clock, real late results                      processes.py, wire.py
    Client            its data, importance, speed
    LocalSGD          what a client does with the model it was sent                               local.py
    Trace             who came when, how stale, with which weight, and the loss                   server.py

Who waits for whom is a `Wait` of `weft.comm.waits`, what a change weighs a rule of `weft.comm.rules`, how it travels a `Codec`
of `weft.comm.codecs`; this package adds the state between them, `Server` (results in, aggregations out) and `Participation` (how
long clients need and how often they take part, declared at first and then counted).

    FedAvg                All()        "unbiased"       FedBuff    Count(c)     "equal", or "unbiased" to correct it
    asynchronous FedAvg   Any()        "equal"          FedFix     Clock(dt)    "unbiased"
    FedAsync              Any()        Polynomial()
"""

from weft.federated.asynchronous import Asynchronous, Client, Trained
from weft.federated.local import LocalSGD
from weft.federated.participation import Participation
from weft.federated.processes import ClientRefused, join, listen, serve, spawn
from weft.federated.server import Aggregation, NothingCame, Server, Step, Trace
from weft.federated.virtual_clock import VirtualClock

__all__ = [
    "Aggregation",
    "Asynchronous",
    "Client",
    "ClientRefused",
    "LocalSGD",
    "NothingCame",
    "Participation",
    "Server",
    "Step",
    "Trace",
    "Trained",
    "VirtualClock",
    "join",
    "listen",
    "serve",
    "spawn",
]

"""fedprune: federated training of recommenders in which every device gets as much of the model as it can carry."""

from fedprune.catalog import CATALOG as CATALOG
from fedprune.config import Settings as Settings
from fedprune.errors import FedpruneError as FedpruneError
from fedprune.experiment import Experiment as Experiment
from fedprune.fleet import SerialFleet as SerialFleet
from fedprune.fleet import VectorFleet as VectorFleet
from fedprune.simulation import prepare as prepare
from fedprune.simulation import read_data as read_data
from fedprune.simulation import run as run
from fedprune.strategy import ServerState as ServerState
from fedprune.strategy import Strategy as Strategy
from fedprune.strategy import one_round as one_round

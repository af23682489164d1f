"""How much of the model does each client get?"""

from fedprune.rates.bandit import Bandit as Bandit
from fedprune.rates.base import Forecast as Forecast
from fedprune.rates.base import Offer as Offer
from fedprune.rates.base import RateLearner as RateLearner
from fedprune.rates.equal_time import EqualTime as EqualTime
from fedprune.rates.known import FJORD as FJORD
from fedprune.rates.known import ByCapability as ByCapability
from fedprune.rates.known import Fixed as Fixed
from fedprune.rates.learned import Learned as Learned

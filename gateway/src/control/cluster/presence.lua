-- Who is here: a host says so once a second, and is gone when it has been silent for the time of a lease.
-- KEYS: hosts by their expiry. ARGV: host, lease (ms; 0: it leaves). Answers the clock (ms since 1970) and the number of hosts.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if lease > 0 then
  redis.call('ZADD', KEYS[1], now + lease, ARGV[1])
  redis.call('PEXPIRE', KEYS[1], lease)
else
  redis.call('ZREM', KEYS[1], ARGV[1])
end
return { now, redis.call('ZCARD', KEYS[1]) }

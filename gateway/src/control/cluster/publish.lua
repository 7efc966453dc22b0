-- Puts one item into a map that all hosts have: of two states of an item the one with the greater stamp stands.
-- KEYS: items, expiries, log. ARGV: item, stamp (of fixed width), value, time to live (ms; 0: for ever).
-- Answers 1, or 0 where a newer or the same state was there. An item is "stamp expiry value"; the log names what changed.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local item, stamp, ttl = ARGV[1], ARGV[2], tonumber(ARGV[4])

-- What has expired goes as new comes: the map is as large as what is in force.
local past = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 100)
for _, old in ipairs(past) do
  redis.call('HDEL', KEYS[1], old)
  redis.call('ZREM', KEYS[2], old)
end

local there = redis.call('HGET', KEYS[1], item)
if there and string.sub(there, 1, #stamp) >= stamp then return 0 end
local expiry = 0
if ttl > 0 then
  expiry = now + ttl
  redis.call('ZADD', KEYS[2], expiry, item)
else
  redis.call('ZREM', KEYS[2], item)
end
redis.call('HSET', KEYS[1], item, stamp .. ' ' .. string.format('%.0f', expiry) .. ' ' .. ARGV[3])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', 10000, '*', 'i', item)
-- Where every item ends, all ends with the last one, a minute later.
if redis.call('ZCARD', KEYS[2]) == redis.call('HLEN', KEYS[1]) then
  local last = redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')
  local left = string.format('%.0f', tonumber(last[2]) - now + 60000)
  for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, left) end
else
  for _, key in ipairs(KEYS) do redis.call('PERSIST', key) end
end
return 1

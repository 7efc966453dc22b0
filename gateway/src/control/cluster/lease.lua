-- Reports of one host about levels, and what it is granted: `Level::report` of level.rs says the same in Rust, and a test
-- holds the two together. All keys of a call have one hash tag, so that a cluster runs it on one node.
--
-- ARGV: lease (µs), how long a silent host's record is kept (µs), then for each key: host, kind (b, s, p, c), amount,
-- window (µs; of p: the period's end, unix ms), time to live of the key (ms; 0: for ever), sequence number, spent, where counting begins in a level
-- that is new to the host, the same where only the record is gone, the level's birth as the host knows it, kept, wanted,
-- needed.
-- Answer, for each key: accepted (1 or 0), out, free, used, hosts, reset (µs), birth.
--
-- A level is a hash: b its birth (µs), u units used, t when that was so (µs), s:N units used in the N-th sixteenth of a window,
-- p the period's end, h:HOST "sequence spent out expiry".

local SLOTS = 16
local FIELDS = 13
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local lease_us, keep_us = tonumber(ARGV[1]), tonumber(ARGV[2])

-- Numbers are doubles, exact to 2^53; tostring would round them to 14 digits.
local function whole(n) return string.format('%.0f', n) end
local function exact(n) return string.format('%.17g', n) end

local function report(key, at)
  local host, kind = ARGV[at], ARGV[at + 1]
  local amount, window = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local ttl_ms, seq, spent = ARGV[at + 4], tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6])
  local from_start, from_known = tonumber(ARGV[at + 7]), tonumber(ARGV[at + 8])
  local birth_known = tonumber(ARGV[at + 9])
  local kept, wanted, needed = tonumber(ARGV[at + 10]), tonumber(ARGV[at + 11]), tonumber(ARGV[at + 12])

  local raw = redis.call('HGETALL', key)
  local used, seen, ends, birth = 0, now, 0, now
  local slots, me, hosts, others, gone = {}, nil, 1, 0, {}
  for i = 1, #raw, 2 do
    local field, value = raw[i], raw[i + 1]
    local sort = string.sub(field, 1, 1)
    if sort == 'u' then used = tonumber(value)
    elseif sort == 't' then seen = tonumber(value)
    elseif sort == 'b' then birth = tonumber(value)
    elseif sort == 'p' then ends = tonumber(value)
    elseif sort == 's' then slots[tonumber(string.sub(field, 3))] = tonumber(value)
    else
      local s, c, o, e = string.match(value, '^(%S+) (%S+) (%S+) (%S+)$')
      e = tonumber(e)
      if field == 'h:' .. host then
        me = { seq = tonumber(s), spent = tonumber(c), out = tonumber(o), expiry = e }
      elseif e > now then
        hosts, others = hosts + 1, others + tonumber(o)
      elseif e + keep_us < now then
        gone[#gone + 1] = field
      end
    end
  end

  -- What time has given back. A clock that went back gives nothing.
  local slot = math.floor(now * SLOTS / math.max(window, 1))
  if kind == 'b' then
    used = math.max(0, used - math.max(0, now - seen) * amount / window)
  elseif kind == 's' then
    used = 0
    for n, units in pairs(slots) do
      if n < slot - SLOTS then gone[#gone + 1] = 's:' .. whole(n) else used = used + units end
    end
  end

  -- A new period begins when the old one has ended by this clock, whatever a host's clock says. Debt goes along.
  if kind == 'p' and window > ends and ends <= now / 1000 + 1000 then
    if ends > 0 then used = math.max(0, used - amount) end
    ends = window
    redis.call('HSET', key, 'p', whole(ends))
  end

  -- A message from before the last one changes nothing; the host does not look at the answer.
  if me and seq < me.seq then return { 0, 0, 0, 0, hosts, 0, birth } end

  local before = from_start
  if me then before = me.spent elseif birth == birth_known then before = math.max(from_start, from_known) end
  local more = spent - before
  used = math.max(0, used + more)
  if kind == 's' and more ~= 0 then
    slots[slot] = math.max(0, (slots[slot] or 0) + more)
    redis.call('HSET', key, 's:' .. whole(slot), whole(slots[slot]))
  end

  local free = math.floor(amount - used - others - kept)
  local extra = 0
  if free > 0 and wanted > 0 then
    extra = math.min(wanted, math.max(math.floor(free / (2 * hosts)), math.min(needed, free)))
  end
  local out = kept + extra

  redis.call('HSET', key, 'b', whole(birth), 'u', exact(used), 't', whole(now),
    'h:' .. host, whole(seq) .. ' ' .. whole(spent) .. ' ' .. whole(out) .. ' ' .. whole(now + lease_us))
  if #gone > 0 then redis.call('HDEL', key, unpack(gone)) end
  if ttl_ms == '0' then redis.call('PERSIST', key) else redis.call('PEXPIRE', key, ttl_ms) end

  local reset = 0
  if kind == 'b' then reset = used * window / math.max(amount, 1) elseif kind == 's' then reset = used > 0 and window or 0 end
  return { 1, out, math.max(0, free - extra), math.floor(used), hosts, math.floor(reset), birth }
end

local answers = {}
for i, key in ipairs(KEYS) do answers[i] = report(key, 3 + (i - 1) * FIELDS) end
return answers
